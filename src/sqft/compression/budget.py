"""Distributes the overall sparsity over the blocks."""

from collections.abc import Mapping, Sequence

import torch

from sqft.compression.statistics import InputNorm
from sqft.compression.walk import BlockWalk
from sqft.compression.wanda import wanda_scores

__all__ = ["arithmetic_offsets", "outlier_offsets", "outlier_ratios", "share_out"]

OUTLIER = 5.0  # times the mean score


def arithmetic_offsets(num_blocks: int, spread: float) -> list[float]:
    """Sparsity rises evenly with depth, from -spread at the first block to +spread at the last.

    Source: ATP, "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical
    Perspective", arXiv 2502.14770, equation 8. Differs from the paper: its step is searched for.
    """
    if num_blocks == 1:
        return [0.0]
    return [spread * (2 * index / (num_blocks - 1) - 1) for index in range(num_blocks)]


def outlier_offsets(ratios: Sequence[float], spread: float) -> list[float]:
    """Blocks with many outliers are pruned less: their ratio, mapped linearly onto +spread .. -spread.

    Source: OWL, arXiv 2310.05175, section 3.2.
    """
    low, high = min(ratios), max(ratios)
    if high == low:
        return [0.0] * len(ratios)
    return [spread * (1 - 2 * (ratio - low) / (high - low)) for ratio in ratios]


def outlier_ratios(walk: BlockWalk, linears: Sequence[str]) -> dict[str, float]:
    """The share of Wanda scores beyond 5 times the layer's mean, of each block of the dense model by name.

    Blocks with none of `linears` have no share, and do not stretch the range of the others'.

    Source: OWL, arXiv 2310.05175, equation 1 (M = 5).
    """
    ratios = {}
    for name, block in walk.blocks.items():
        walk.load(name)
        inside = {n: block.get_submodule(n[len(name) + 1 :]) for n in linears if n.startswith(name + ".")}
        above = total = 0
        for group in walk.collect(name, walk.input_groups(name, inside), InputNorm) if inside else ():
            for linear in group.names:
                weight = inside[linear].weight
                assert isinstance(weight, torch.Tensor)
                scores = wanda_scores(weight, group.statistic.norm)
                above += int((scores > OUTLIER * scores.mean()).sum())
                total += scores.numel()
        if total:
            ratios[name] = above / total
        walk.advance(name)
        walk.unload(name)
    return ratios


def share_out(sparsity: float, offsets: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """The sparsity of each linear: `sparsity` plus its offset, within 0..1, moved so that the whole is exact.

    sizes: weights of each linear.
    """
    total = sum(sizes.values())
    low, high = -2.0, 2.0
    shares: dict[str, float] = {}
    for _ in range(60):
        shift = (low + high) / 2
        shares = {name: min(1.0, max(0.0, sparsity + offsets[name] + shift)) for name in sizes}
        reached = sum(shares[name] * sizes[name] for name in sizes) / total
        low, high = (shift, high) if reached < sparsity else (low, shift)
    return shares
