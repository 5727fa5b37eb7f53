"""The rungs of a merge: ways to put an update onto a base's grid or mask, from cheap to costly.

round     keep the grid and round
feedback  keep the grid; later columns make up for the rounding of earlier ones (GPTQ)
rescale   GPTQ with scales fitted anew to the adapted weights
polish    start from the best so far and train the weights before rounding against the unmerged model
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sqft.compression.quantize import METHODS
from sqft.compression.statistics import Hessian
from sqft.compression.walk import BlockWalk
from sqft.foreign.erasure import Weight
from sqft.models import Checkpoint, load_model
from sqft.ops import QParams, QuantizedWeight, dequantize, fake_quantize, quantize
from sqft.ops.adapted import exact_float32, round_storage
from sqft.progress import SILENT, Progress
from sqft.sections import QuantizeSection

__all__ = ["feed_back", "polish_weights", "walk_rung"]

Round = Callable[[str, Tensor, Tensor | None, Hessian], QuantizedWeight]


def feed_back(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"] | None,
    hessian: Hessian,
    qparams: QParams,
    damping: float,
) -> QuantizedWeight:
    """Round onto a grid that is given, each column making up for the errors of those before it.

    Source: GPTQ, arXiv 2210.17323, equations 2 and 3, with the base's grid instead of a fresh one.
    """
    factor, _ = hessian.inverse_factor(damping)
    size = qparams.group_size(weight.shape[1])
    work = weight.float().T.contiguous()
    kept = None if mask is None else mask.T
    codes = torch.empty(work.shape, dtype=torch.uint8)
    with exact_float32(weight.device):
        for j in range(len(work)):
            scale, zero_point = qparams.scale[:, j // size], qparams.zero_point[:, j // size].float()
            wanted = work[j] if kept is None else torch.where(kept[j], work[j], torch.zeros_like(work[j]))
            code = (torch.round(wanted / scale) + zero_point).clamp(0, qparams.max_code)
            codes[j] = code.to(torch.uint8)
            error = (work[j] - (code - zero_point) * scale) / factor[j, j]
            if j + 1 < len(work):
                work[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
    return QuantizedWeight(codes.T.contiguous(), qparams)


def walk_rung(
    rung: str,
    base: Checkpoint,
    adapted: Checkpoint,
    masks: Mapping[str, Tensor],
    names: list[str],
    calibration: Int[Tensor, "n length"],
    progress: Progress = SILENT,
) -> Iterator[tuple[str, QuantizedWeight]]:
    """The rungs feedback and rescale: one block in memory, each seeing the outputs of the blocks before it.

    adapted: the unmerged model's weights, dense. rescale makes every quantized linear anew, so that all share
    one kind of grid; feedback those of them in `names`.
    """
    assert base.grid is not None
    grid, quantized = base.grid, list(base.quantized_names)
    wanted = quantized if rung == "rescale" else [name for name in names if name in set(quantized)]
    section = QuantizeSection(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric)
    with BlockWalk(adapted, calibration) as walk, progress.task(rung, len(walk.blocks)) as advance:
        for block in walk.blocks:
            walk.load(block)
            modules: dict[str, Any] = {
                name: walk.model.get_submodule(name) for name in wanted if name.startswith(block + ".")
            }
            for names_together in walk.input_groups(block, modules) if modules else []:
                (group,) = walk.collect(block, [names_together], Hessian)
                for name in names_together:
                    module, mask = modules[name], masks.get(name)
                    if rung == "feedback":
                        old = base.quantized(name)
                        new = feed_back(module.weight, mask, group.statistic, old.qparams, section.damping)
                    else:
                        new = METHODS["gptq"].round(module.weight, mask, group.statistic, section).quantized
                    module.weight = nn.Parameter(new.dequantize(), requires_grad=False)
                    yield name, new
            walk.advance(block)
            walk.unload(block)
            advance(1)


class _PolishedLinear(nn.Module):
    """A linear whose weight before rounding is trained, in steps of its grid or in its own units."""

    def __init__(self, linear: nn.Linear, start: Tensor, merged: Weight, mask: Tensor | None) -> None:
        super().__init__()
        self.bias = linear.bias
        self.merged, self.mask = merged, mask
        self.unit = _unit(merged, start)
        self.steps = nn.Parameter(start / self.unit)

    def weight(self) -> Tensor:
        """The weight as a merge would write it, differentiable through the rounding."""
        weight = self.steps * self.unit
        if self.mask is not None:
            weight = torch.where(self.mask, weight, torch.zeros_like(weight))
        if isinstance(self.merged, QuantizedWeight):
            return fake_quantize(weight, self.merged.qparams)
        return round_storage(weight, self.merged.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)

    def result(self) -> Weight:
        """What to write."""
        with torch.no_grad():
            if isinstance(self.merged, QuantizedWeight):
                weight = self.steps * self.unit
                if self.mask is not None:
                    weight = torch.where(self.mask, weight, torch.zeros_like(weight))
                return QuantizedWeight(quantize(weight, self.merged.qparams), self.merged.qparams)
            return self.weight().to(self.merged.dtype)


def polish_weights(
    merged_dir: Any,
    teacher: nn.Module,
    start: Mapping[str, Weight],
    masks: Mapping[str, Tensor],
    calibration: Int[Tensor, "n length"],
    *,
    steps: int = 60,
    batch_size: int = 4,
    learning_rate: float = 0.02,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Weight]:
    """Train the merged weights towards the unmerged model's distribution on the calibration tokens.

    start: the merged weights of the rung before; their grids are kept. The loss is the KL divergence from
    the unmerged model. Holds the merged and the unmerged model in memory, in float32.

    Source: self-distillation as in LLM-QAT, arXiv 2305.17888, with the straight-through rounding of sqft.
    """
    model = load_model(merged_dir, dtype=torch.float32)
    unmerged = dict(teacher.named_modules())
    layers: dict[str, _PolishedLinear] = {}
    for name, merged in start.items():
        linear: Any = model.get_submodule(name)
        teaching: Any = unmerged[name]
        values = _between(teaching.weight.detach().float(), merged)
        layers[name] = _PolishedLinear(linear, values, merged, masks.get(name))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    trained = [layer.steps for layer in layers.values()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    with progress.task("polish", steps) as advance:
        for _ in range(steps):
            rows = torch.randint(len(calibration), (batch_size,), generator=generator)
            with torch.no_grad():
                expected = teacher(input_ids=calibration[rows]).logits.float().log_softmax(-1)
            found = model(input_ids=calibration[rows]).logits.float().log_softmax(-1)
            loss = (expected.exp() * (expected - found)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1)
    return {name: layer.result() for name, layer in layers.items()}


def _between(unmerged: Tensor, merged: Weight) -> Tensor:
    """A weight that rounds to the merged codes and is as near the unmerged one as it can be."""
    if not isinstance(merged, QuantizedWeight):
        return merged.float()
    scale = merged.qparams.scale.repeat_interleave(merged.qparams.group_size(unmerged.shape[1]), dim=1)
    exact = dequantize(merged.codes, merged.qparams)
    return exact + (unmerged - exact).clamp(-scale * 7 / 16, scale * 7 / 16)


def _unit(merged: Weight, start: Tensor) -> Tensor:
    """By how much a step of 1 moves a weight."""
    if isinstance(merged, QuantizedWeight):
        size = merged.qparams.group_size(start.shape[1])
        return merged.qparams.scale.repeat_interleave(size, dim=1)
    return start.abs().mean(1, keepdim=True).clamp_min(1e-8) / 4
