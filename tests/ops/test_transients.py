"""How many bytes live at once while the fused layer runs, counted tensor by tensor."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sqft.ops import GridSpec, compute_qparams, encode_latent, keep_nonzero, quantize
from sqft.ops import weight_blocks as module
from sqft.ops.adapted_linear import adapted_linear

OUT, COLUMNS, RANK, TOKENS, ROWS = 512, 256, 4, 8, 64
SMALL = 16 * COLUMNS  # elements of a block of the elementwise passes


class LiveBytes(TorchDispatchMode):
    """The most bytes of new storages that were alive at the same time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if storage.data_ptr() not in self.known and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.most = max(self.most, sum(self.live.values()))
        return out


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transients_stay_within_the_stated_bound(
    dtype: torch.dtype, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_ELEMENTS", {"cpu": SMALL})
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", {"cpu": ROWS * COLUMNS})
    monkeypatch.setattr(module, "MIN_ROWS", 16)
    mask = torch.rand(OUT, COLUMNS) > 0.5
    weight = keep_nonzero(torch.randn(OUT, COLUMNS), mask)
    grid = compute_qparams(weight, GridSpec(4, 32, True))
    base = encode_latent(weight, quantize(weight, grid), mask, grid) if quantized else weight.to(dtype)
    qparams = grid if quantized else None
    x = torch.randn(TOKENS, COLUMNS, dtype=dtype, requires_grad=True)
    A = torch.randn(RANK, COLUMNS, requires_grad=True)
    B = torch.randn(OUT, RANK, requires_grad=True)
    dy = torch.randn(TOKENS, OUT, dtype=dtype)
    known = (x, base, A, B, dy, grid.scale, grid.zero_point)
    # Inputs, outputs and gradients, in float32 and once more as copies.
    small = 4 * 4 * (TOKENS * (OUT + COLUMNS) + 2 * RANK * (OUT + COLUMNS) + OUT * COLUMNS // 32)
    blocks = 4 * 4 * SMALL
    with LiveBytes(*known) as forward:
        y = adapted_linear(x, base, A, B, scaling=0.5, qparams=qparams)
    assert forward.most <= OUT * COLUMNS * dtype.itemsize + blocks + small
    with LiveBytes(*known, y) as backward:
        torch.autograd.grad(y, (x, A, B), dy)
    assert backward.most <= 2 * ROWS * COLUMNS * dtype.itemsize + blocks + small
    assert backward.most < OUT * COLUMNS * 4  # a bound below the weight itself: the test can fail
