"""Fits the numbers of one compressed block so that it puts out what the dense block does.

    loss = mean over tokens of |output - target|² / |target|²

`output` is what the block makes of the compressed model's hidden states, `target` what the dense block makes
of the dense model's: a block also mends what the blocks before it lost. Adam, the rate falling to 0 as a half
cosine, over the batches in an order drawn from the seed. After each epoch the loss on held-out batches is
measured, and the best epoch is kept; where none is better than the start, the block stays as it was.

Source: EfficientQAT, arXiv 2407.11062, section 3.2 (Block-AP); masked weights: arXiv 2510.14444.
Differs from the papers: zeros stay zeros; the loss of a token counts relative to its size, as the norm after
it sees it; a scale is a factor on codes of the base's grid, and rounded while it is trained
(docs/decisions/0013-trained-scales.md).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sqft.compression.fitted import FittedPart

__all__ = ["FitResult", "Pair", "fit_block"]

Pair = tuple[Tensor, Tensor]  # a batch of hidden states, and the target of the block's output
Run = Callable[[Tensor, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class FitResult:
    """Losses on the held-out batches before and after; the epoch that was kept, 0 where none was better.

    num_epochs: how many ran. diverged: the loss was no number any more, and training ended.
    """

    before: float
    after: float
    epoch: int
    num_epochs: int = 0
    diverged: bool = False


def fit_block(
    run: Run,
    parts: Mapping[str, FittedPart],
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    *,
    rates: Mapping[str, float],
    epochs: int,
    seed: int,
) -> FitResult:
    """Train the changes of the parts, which are then those of the best epoch.

    run: (hidden states, parameters by name in the block) → the block's output. rates: by kind of change.
    """
    groups = [
        {"params": [part.changes[kind] for part in parts.values() if kind in part.changes], "lr": rate}
        for kind, rate in rates.items()
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    steps = epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    order = torch.Generator().manual_seed(seed)
    before = best = _measure(run, parts, held_out)
    if not math.isfinite(before):
        return FitResult(before, before, 0)
    kept, epoch = {name: part.keep() for name, part in parts.items()}, 0
    number, diverged = 0, False
    for number in range(1, epochs + 1):
        for index in torch.randperm(len(train), generator=order).tolist():
            hidden, target = train[index]
            loss = block_loss(run(hidden, _values(parts)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        reached = _measure(run, parts, held_out)
        diverged = not math.isfinite(reached)
        if diverged:
            break
        if reached < best:
            best, epoch = reached, number
            kept = {name: part.keep() for name, part in parts.items()}
    for name, part in parts.items():
        part.restore(kept[name])
    return FitResult(before, best, epoch, number, diverged)


def block_loss(
    output: Float[Tensor, "*tokens hidden"], target: Float[Tensor, "*tokens hidden"]
) -> Float[Tensor, ""]:
    """Mean over tokens of the squared error relative to the target's square."""
    error = (output.float() - target.to(output.device).float()).square().sum(-1)
    return (error / target.to(output.device).float().square().sum(-1).clamp_min(1e-12)).mean()


def _values(parts: Mapping[str, FittedPart]) -> dict[str, Tensor]:
    return {name: part.value() for name, part in parts.items()}


@torch.no_grad()
def _measure(run: Run, parts: Mapping[str, FittedPart], pairs: Sequence[Pair]) -> float:
    values = _values(parts)
    losses = [block_loss(run(hidden, values), target) for hidden, target in pairs]
    return float(torch.stack(losses).mean())
