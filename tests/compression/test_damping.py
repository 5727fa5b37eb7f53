"""How much damping a Hessian gets, and what is said when none is enough."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.compression.tiny_runs import quantize, sparsify
from torch import Tensor

from sqft.compression.statistics import Hessian, factor_inverse
from sqft.errors import CompressionError
from sqft.sections import QuantizeSection, SparsifySection

Maker = Callable[..., Path]


@pytest.mark.parametrize("section", [SparsifySection, QuantizeSection])
def test_more_damping_than_is_ever_tried_is_refused(section: type) -> None:
    assert section(damping=1.0).damping == 1.0
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        section(damping=3.0)


@pytest.mark.parametrize(("asked", "tried"), [(0.03, [0.03, 0.3, 1.0]), (0.5, [0.5, 1.0]), (1.0, [1.0])])
def test_damping_grows_until_1_is_tried(
    asked: float, tried: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, seen = torch.eye(4), []
    cholesky = torch.linalg.cholesky_ex

    def fail_below_1(damped: Tensor) -> tuple[Tensor, Tensor]:
        added = float(damped.flip(0, 1)[0, 0]) - 1
        seen.append(added)
        lower, info = cholesky(damped.flip(0, 1))
        return lower, info if added > 0.99 else info + 1

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail_below_1)
    assert factor_inverse(matrix.flip(0, 1), asked)[1] == 1.0
    assert seen == pytest.approx(tried, rel=1e-4)


@pytest.mark.parametrize(("compress", "method"), [(sparsify, "sparsegpt"), (quantize, "gptq")])
def test_a_hessian_beyond_help_is_told_with_its_layer(
    tiny_model_dir: Maker,
    tmp_path: Path,
    compress: Callable[..., Any],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = Hessian.matrix
    monkeypatch.setattr(Hessian, "matrix", lambda statistic: -matrix(statistic))
    message = r"model\.layers\.0\.self_attn\.q_proj: the Hessian cannot be factorised even with damping 1;"
    with pytest.raises(CompressionError, match=message):
        compress(tiny_model_dir("llama"), tmp_path / "out", method=method, damping=0.3)
