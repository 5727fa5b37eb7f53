"""How much damping a Hessian gets, and what is said when none is enough."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.compression.tiny_runs import quantize, sparsify

from sqft.compression.statistics import Hessian, SingularHessianError, factor_inverse
from sqft.errors import CompressionError
from sqft.sections import QuantizeSection, SparsifySection

Maker = Callable[..., Path]


@pytest.mark.parametrize("section", [SparsifySection, QuantizeSection])
def test_more_damping_than_is_ever_tried_is_refused(section: type) -> None:
    assert section(damping=1.0).damping == 1.0
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        section(damping=3.0)


# The mean diagonal is 1, the eigenvalues are 1 + coupling and 1 - coupling: more than coupling - 1 is needed.
@pytest.mark.parametrize(
    ("coupling", "asked", "needed"),
    [
        (0.5, 0.03, 0.03),
        (1.2, 0.03, 0.3),
        (1.6, 0.03, 1.0),
        (1.6, 0.5, 1.0),
        (1.6, 0.7, 0.7),
        (1.6, 1.0, 1.0),
    ],
)
def test_damping_grows_tenfold_until_it_suffices(coupling: float, asked: float, needed: float) -> None:
    hessian = torch.tensor([[1.0, coupling], [coupling, 1.0]])
    factor, damping = factor_inverse(hessian, asked)
    assert damping == pytest.approx(needed)
    inverse = torch.linalg.inv(hessian.double() + needed * torch.eye(2))
    torch.testing.assert_close(factor.T.double() @ factor.double(), inverse, rtol=1e-4, atol=1e-5)


def test_damping_of_1_is_the_last_that_is_tried() -> None:
    with pytest.raises(SingularHessianError, match="even with damping 1;"):
        factor_inverse(torch.tensor([[1.0, 2.5], [2.5, 1.0]]), 0.1)


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
