"""GPTAQ against a slow one, and against GPTQ where the uncompressed model's inputs are known."""

import pytest
import torch
from pydantic import ValidationError
from tests.compression.tiny_runs import inputs
from torch import Tensor

from sqft.compression.gptaq import ALPHA, gptaq
from sqft.compression.gptq import gptq
from sqft.compression.statistics import DenseTargetHessian
from sqft.ops import GridSpec, compute_qparams, dequantize
from sqft.sections import QuantizeSection


def pair(columns: int, drift: float = 0.2) -> tuple[Tensor, Tensor]:
    """Inputs after compression, and the uncompressed model's: a smaller, turned version."""
    x = inputs(900, columns)
    turn = torch.randn(columns, columns, generator=torch.Generator().manual_seed(5)) / columns**0.5
    return x, x + drift * (x @ turn + x)


def statistic_of(x: Tensor, dense: Tensor) -> DenseTargetHessian:
    statistic = DenseTargetHessian(x.shape[1], x.device)
    for part, dense_part in zip(x.split(128), dense.split(128), strict=True):
        statistic.update(part, dense_part)
    return statistic


def slow_gptaq(
    weight: Tensor, mask: Tensor, x: Tensor, dense: Tensor, order: list[int], size: int, static: bool
) -> tuple[Tensor, Tensor]:
    """(rounded, before rounding): both inverses of what is left taken anew for every column."""
    hessian = (x.T @ x / len(x)).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    moved = ((dense - x).T @ x / len(x)).double()
    work, before = weight.double().clone(), torch.empty_like(weight).double()
    first = compute_qparams(torch.where(mask, weight, 0), GridSpec(4, size, True))
    scale, zero = first.scale.clone(), first.zero_point.clone()
    for step, j in enumerate(order):
        if not static and j % size == 0:
            part = slice(j, j + size)
            kept = torch.where(mask[:, part], work[:, part], 0).float()
            fresh = compute_qparams(kept, GridSpec(4, size, True))
            scale[:, j // size], zero[:, j // size] = fresh.scale[:, 0], fresh.zero_point[:, 0]
        s, z = scale[:, j // size].double(), zero[:, j // size].double()
        before[:, j] = old = work[:, j].clone()
        value = torch.where(mask[:, j], ((torch.round(old / s) + z).clamp(0, 15) - z) * s, 0)
        rest, later = order[step:], order[step + 1 :]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        work[:, rest] -= ((old - value) / inverse[0, 0])[:, None] * inverse[0][None, :]
        if later:
            share = torch.linalg.solve(hessian[later][:, later], moved[j, later])
            work[:, later] += ALPHA * old[:, None] * share[None, :]
        work[:, j] = value
    return work.float(), before.float()


@pytest.mark.parametrize(("size", "ordered"), [(8, False), (96, False), (8, True)])
@pytest.mark.parametrize("masked", [True, False])
def test_gptaq_against_a_slow_one(size: int, ordered: bool, masked: bool) -> None:
    columns = 288  # more than two blocks, which groups of 96 cross
    x, dense = pair(columns)
    weight = torch.randn(5, columns)
    mask = torch.rand(weight.shape) > (0.5 if masked else -1.0)
    statistic = statistic_of(x, dense)
    got = gptaq(weight, mask, statistic, GridSpec(4, size, True), damping=0.01, activation_order=ordered)
    order = list(range(columns))
    if ordered:
        order = torch.argsort(statistic.norm, descending=True, stable=True).tolist()
    expected, before = slow_gptaq(weight, mask, x, dense, order, size, ordered)
    value = dequantize(got.codes, got.qparams)
    assert (value[~mask] == 0).all()
    # float32 and float64 fall to other sides of a rounding now and then, and later columns follow
    agree = torch.isclose(value, expected, rtol=1e-3, atol=1e-3).float().mean()
    assert agree > 0.9, agree
    first = mask & torch.isclose(got.before_rounding, before, rtol=1e-2, atol=1e-2)
    assert first.sum() > 0.9 * mask.sum()


def test_gptaq_comes_nearer_to_the_uncompressed_outputs_than_gptq() -> None:
    x, dense = pair(128)
    weight, options = torch.randn(32, 128), GridSpec(4, 32, True)
    statistic = statistic_of(x, dense)

    def error(value: Tensor) -> float:
        return float((dense @ weight.T - x @ value.T).square().sum())

    found = [round_(weight, None, statistic, options, damping=0.01) for round_ in (gptaq, gptq)]
    ours, plain = (error(dequantize(rounded.codes, rounded.qparams)) for rounded in found)
    assert ours < 0.95 * plain


def test_gptaq_is_gptq_where_nothing_moved() -> None:
    x, _ = pair(64)
    weight, options = torch.randn(8, 64), GridSpec(4, 32, True)
    statistic = statistic_of(x, x)
    rounded = [round_(weight, None, statistic, options, damping=0.01).codes for round_ in (gptaq, gptq)]
    assert (rounded[0] == rounded[1]).float().mean() > 0.99


def test_what_gptaq_does_not_do_is_refused() -> None:
    with pytest.raises(ValidationError, match="refit would be ignored: gptaq does not do it"):
        QuantizeSection(method="gptaq", refit=3)
    assert "refit" not in QuantizeSection(method="gptaq", descent=2).model_dump()
