"""What a packed sparse product is measured against: ggml's Q4_0, OpenVINO's INT4, torch's float32."""

import ctypes
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sqft.kernels.packed_matrix import HugePages

__all__ = ["WALKED", "Ggml", "OpenVinoLinears", "TorchLinear"]

WALKED = 160 << 20  # bytes of each kind of weight, walked through in turn: no cache holds them


class Ggml:
    """ggml's product of a repacked Q4_0 weight, in the library that xllamacpp brings."""

    def __init__(self, rows: int, columns: int) -> None:
        import xllamacpp

        path = next(Path(str(xllamacpp.__file__)).parent.glob("xllamacpp*.so"))
        self.library = ctypes.CDLL(str(path))
        self.library.ggml_cpu_init()
        for name in ("ggml_gemv_q4_0_8x8_q8_0", "ggml_gemm_q4_0_8x8_q8_0"):
            getattr(self.library, name).argtypes = [
                ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p,
                ctypes.c_int, ctypes.c_int,
            ]  # fmt: skip
        for name in ("quantize_row_q8_0", "ggml_quantize_mat_q8_0_4x8"):
            getattr(self.library, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self.rows, self.columns = rows, columns
        self.steps = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
        self.scale = (torch.rand(rows, columns // 32) * 0.01 + 0.001).half().float()
        pages = HugePages()
        packed = self._repack()
        self.bytes = packed.numel()
        self.copies = [pages.keep(packed) for _ in range(max(1, WALKED // self.bytes))]

    def _repack(self) -> Tensor:
        """block_q4_0x8: 8 scales, then 8 bytes of each of 8 rows in turn, nibbles with their top bit flipped.

        Source: ggml, `ggml-cpu/repack.cpp`, make_block_q4_0x8.
        """
        blocks = self.columns // 32
        codes = (self.steps + 8).to(torch.uint8).view(self.rows // 8, 8, blocks, 2, 16)
        nibbles = (codes[..., 0, :] | codes[..., 1, :] << 4) ^ 0x88  # (stripes, 8, blocks, 16)
        nibbles = nibbles.view(self.rows // 8, 8, blocks, 2, 8).permute(0, 2, 3, 1, 4).flatten(2)
        scale = self.scale.half().view(self.rows // 8, 8, blocks).permute(0, 2, 1).contiguous()
        return torch.cat([scale.view(torch.uint8).flatten(2), nibbles], dim=2).contiguous().view(-1)

    def multiply(self, x: Tensor, y: Tensor, copy: int, first: int, last: int) -> None:
        """Rows first..last of y = x times the weight, for one vector or a multiple of four."""
        batch, columns = x.shape
        quantized = torch.empty(batch * columns // 32 * 34 + 64, dtype=torch.uint8)
        at, size = quantized.data_ptr(), columns // 32 * 34
        if batch == 1:
            self.library.quantize_row_q8_0(x.data_ptr(), at, columns)
        else:
            for four in range(0, batch, 4):
                self.library.ggml_quantize_mat_q8_0_4x8(x[four].data_ptr(), at + four * size, columns)
        name = "ggml_gemv_q4_0_8x8_q8_0" if batch == 1 else "ggml_gemm_q4_0_8x8_q8_0"
        weight = self.copies[copy % len(self.copies)].data_ptr() + self.bytes // self.rows * first
        where = y.data_ptr() + 4 * first
        getattr(self.library, name)(columns, where, self.rows, weight, at, batch, last - first)


class OpenVinoLinears:
    """Products with symmetric INT4 weights in groups of 32, compiled into one graph that runs them in turn.

    OpenVINO takes the instructions that it likes, and rounds activations to 8 bits where it sees fit.
    """

    def __init__(self, steps: Tensor, scale: Tensor, threads: int) -> None:
        import openvino as ov
        from openvino import opset13 as op

        rows, columns = steps.shape
        self.bytes = rows * columns // 32 * 18
        self.count = max(1, WALKED // self.bytes)
        pairs = steps.numpy().reshape(-1, 2).view(np.uint8) & 15
        nibbles = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)
        scales = scale.numpy().astype(np.float16)
        vector = op.parameter([-1, columns], np.float32)
        keep: list[np.ndarray] = []
        results = []
        for _ in range(self.count):  # of memory of their own, or OpenVINO would see that they are alike
            keep.append(nibbles.copy())
            shape = ov.Shape([rows, columns // 32, 32])
            codes = ov.op.Constant(ov.Tensor(keep[-1], shape, ov.Type.i4))
            weight = op.multiply(op.convert(codes, "f16"), op.constant(scales[..., None]))
            weight = op.convert(op.reshape(weight, np.array([rows, columns]), False), "f32")
            results.append(op.matmul(vector, weight, False, True))
        model = ov.Model(results, [vector])
        options = {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        self._request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
        self._keep = keep  # the constants share this memory, and what is compiled may read it

    def multiply(self, x: Tensor) -> Tensor:
        """All products, of which the first is given back."""
        return torch.from_numpy(self._request.infer([x.numpy()])[0])


class TorchLinear:
    """torch's product in float32, which is what transformers runs on a CPU."""

    def __init__(self, steps: Tensor, scale: Tensor) -> None:
        rows, columns = steps.shape
        self.bytes = rows * columns * 4
        weight = (steps.view(rows, -1, 32).float() * scale[..., None]).flatten(1)
        self.copies = [weight.clone() for _ in range(max(1, WALKED // self.bytes))]

    def multiply(self, x: Tensor, copy: int) -> Tensor:
        """x times the transposed weight."""
        return torch.nn.functional.linear(x, self.copies[copy])
