"""The adapted weight built in row blocks that stay in cache: the same values as `ops.adapted`, fewer passes.

`ops.adapted` is the definition; this is how training computes it. On a CPU the values are equal, number for
number (a tested fact; zeros may differ in sign). No mask is read: it is `base != 0`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqft.kernels.choices import TORCH, Choice
from sqft.ops.grid import QParams

__all__ = ["WeightBlocks", "cache_blocks", "row_blocks", "transient_blocks"]

# Elements of a float32 block that the elementwise passes walk over: on a CPU it lies in a core's cache, on a
# GPU it bounds their four temporaries (64 MiB), so that no frozen base is ever widened as a whole.
CACHE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 22}
# Elements of the two transients of a backward block (weight and gradient); at least MIN_ROWS rows. On a GPU
# any layer of an 8B model is one block (117 MB in 16 bits): dX is one product, not a sum of rounded ones.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
MIN_ROWS = 256


def row_blocks(rows: int, columns: int, elements: int, minimum: int = 1) -> list[slice]:
    """Slices that cover `rows`: at most `elements` elements each, at least `minimum` rows, 16-aligned."""
    size = max(elements // columns // 16 * 16, minimum, 16)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def transient_blocks(rows: int, columns: int, device: str) -> list[slice]:
    """The row blocks of a backward pass over a weight, on a kind of device."""
    return row_blocks(rows, columns, BLOCK_ELEMENTS.get(device, 1 << 26), MIN_ROWS)


def cache_blocks(rows: int, columns: int, device: str) -> list[slice]:
    """The pieces of a row block that elementwise passes work on at a time."""
    return row_blocks(rows, columns, CACHE_ELEMENTS.get(device, 1 << 22))


@dataclass(frozen=True)
class WeightBlocks:
    """Builds rows of the adapted weight from a base, which is a float weight or an integer latent.

    storage_dtype: round to this 16-bit type; qparams: round to this grid; kernels: what builds and contracts;
    scale: a trained one, which the codes are multiplied with in the place of the grid's (by torch only).
    """

    base: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    qparams: QParams | None
    storage_dtype: torch.dtype | None
    kernels: Choice = TORCH
    scale: Tensor | None = None

    def transient_blocks(self) -> list[slice]:
        """The row blocks of a backward pass."""
        rows, columns = self.base.shape
        return transient_blocks(rows, columns, self.base.device.type)

    def build(
        self, rows: slice, dtype: torch.dtype, gradient: Tensor | None = None, dscale: Tensor | None = None
    ) -> Tensor:
        """Rows of the adapted weight in a compute dtype.

        gradient: that of these rows; becomes that of the adapted weight before rounding, in place: times the
        mask, times 0 where a code was clamped, times scale over grid scale where the scale is trained.
        dscale: receives the gradient of the trained scale in these rows.
        """
        if self.kernels.weight is not None:
            if gradient is None:
                return self._build_triton(rows, dtype, None)
            weight, keep = self.build_with_mask(rows, dtype)
            gradient.mul_(keep != 0)
            return weight
        weight = torch.empty(rows.stop - rows.start, self.base.shape[1], dtype=dtype, device=self.base.device)
        lora_A, lora_B = self.lora_A.float(), self.lora_B[rows].float()
        for part in cache_blocks(len(weight), self.base.shape[1], self.base.device.type):
            target = weight[part]
            whole = slice(rows.start + part.start, rows.start + part.stop)
            block = target if dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
            torch.mm(lora_B[part], lora_A, out=block)
            keep = torch.empty_like(block)
            self._add_base(block, keep, whole)
            if self.qparams is not None:
                self._round_to_grid(block, keep if gradient is not None else None, whole)
                self._multiply_scale(block, whole, None if gradient is None else gradient[part], dscale)
            elif self.storage_dtype is not None:
                block.copy_(block.to(self.storage_dtype))
            if gradient is not None:
                gradient[part].mul_(keep)
            if block is not target:
                target.copy_(block)
        return weight

    def build_with_mask(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows of the weight by the kernel, and a tensor that is not 0 where a weight has a gradient."""
        if self.qparams is None:
            return self._build_triton(rows, dtype, None), self.base[rows]
        keep = torch.empty(self.base[rows].shape, dtype=torch.uint8, device=self.base.device)
        return self._build_triton(rows, dtype, keep), keep

    def contract_gradient(self, rows: slice, dy: Tensor, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of A and of these rows of B by the kernel; dy (tokens, rows), x (tokens, in)."""
        from sqft.kernels.tiles import contract_gradient, contract_product

        assert self.kernels.gradient is not None
        settings: dict[str, Any] = {"scaling": self.scaling, "tiling": self.kernels.gradient}
        if self.kernels.product:
            return contract_product(torch.mm(dy.t(), x), keep, self.lora_A, self.lora_B[rows], **settings)
        return contract_gradient(dy, x, keep, self.lora_A, self.lora_B[rows], **settings)

    def _build_triton(self, rows: slice, dtype: torch.dtype, keep: Tensor | None) -> Tensor:
        from sqft.kernels.tiles import build_weight

        assert self.kernels.weight is not None
        grid: dict[str, Any] = {}
        if self.qparams is not None:
            grid = {"scale": self.qparams.scale[rows], "zero_point": self.qparams.zero_point[rows]}
            grid |= {"max_code": self.qparams.max_code, "symmetric": self.qparams.symmetric}
        return build_weight(
            self.base[rows],
            self.lora_A,
            self.lora_B[rows],
            scaling=self.scaling,
            dtype=dtype,
            storage_dtype=self.storage_dtype,
            keep=keep,
            tiling=self.kernels.weight,
            **grid,
        )

    def _add_base(self, block: Tensor, keep: Tensor, rows: slice) -> None:
        """block = base + mask * block * scaling; keep = mask."""
        base = self.base[rows]
        if not base.is_floating_point():
            assert self.qparams is not None
            base = self._decode(base, keep, rows)
        else:
            base = base.float()
            torch.ne(base, 0, out=keep)
        torch.addcmul(base, block, keep, value=self.scaling, out=block)

    def _decode(self, latent: Tensor, keep: Tensor, rows: slice) -> Tensor:
        # (latent - 8) / 16 - zero_point, times scale: exact, so the sixteenth may go into the scale.
        assert self.qparams is not None
        base = torch.empty_like(keep)
        base.copy_(latent)
        groups = base.unflatten(1, (self.qparams.scale.shape[1], -1))
        if self.qparams.symmetric:
            base.sub_(16 * (1 << (self.qparams.bits - 1)) + 8)
        else:
            groups.sub_(self.qparams.zero_point[rows, :, None].float() * 16 + 8)
        torch.ne(base, 0, out=keep)
        groups.mul_(self.qparams.scale[rows, :, None] / 16)
        return base

    def _round_to_grid(self, block: Tensor, keep: Tensor | None, rows: slice) -> None:
        assert self.qparams is not None
        scale = self.qparams.scale[rows, :, None]
        groups = block.unflatten(1, (scale.shape[1], -1))
        torch.round(groups.div_(scale), out=groups)
        if self.qparams.symmetric:
            zero = 1 << (self.qparams.bits - 1)
            clamped = torch.clamp(groups, -zero, self.qparams.max_code - zero)
        else:
            zeros = self.qparams.zero_point[rows, :, None].float()
            clamped = torch.clamp(groups, -zeros, self.qparams.max_code - zeros)
        if keep is not None:
            inside = torch.eq(clamped, groups, out=torch.empty_like(groups))
            keep.unflatten(1, (scale.shape[1], -1)).mul_(inside)
        groups.copy_(clamped)

    def _multiply_scale(
        self, steps: Tensor, rows: slice, gradient: Tensor | None, dscale: Tensor | None
    ) -> None:
        """Multiply steps by the scale in place, and fill in the gradients of scale and weight."""
        assert self.qparams is not None
        scale = self.qparams.scale[rows, :, None]
        groups = steps.unflatten(1, (scale.shape[1], -1))
        if self.scale is not None:
            grid_scale, scale = scale, self.scale[rows, :, None]
            if gradient is not None:
                grouped = gradient.unflatten(1, (scale.shape[1], -1))
                if dscale is not None:
                    dscale[rows] = (grouped * groups).sum(-1, dtype=torch.float32)
                grouped.mul_(scale / grid_scale)
        groups.mul_(scale)
