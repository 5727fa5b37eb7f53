"""Compile every kernel of `sqft.kernels.tiles`, in each cut that is measured, for a GPU that is not there.

python tests/kernels/compile_kernels.py CAPABILITY prints one JSON line a kernel: registers, bytes of stack
(what did not fit into registers), shared memory, and whether products run on the tensor cores.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from benchmarks.gpu.part_layers import FUSED_TILINGS, PRODUCT_TILINGS, WEIGHT_TILINGS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from sqft.kernels import tiles
from sqft.kernels.choices import Tiling

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
POINTERS = {
    "scale_ptr": "*fp32",
    "zero_ptr": "*u8",
    "a_ptr": "*fp32",
    "b_ptr": "*fp32",
    "da_ptr": "*fp32",
    "db_ptr": "*fp32",
}


def weight(tiling: Tiling, latent: bool) -> dict[str, Any]:
    types = {"weight_ptr": "*bf16", "keep_ptr": "*u8", "base_ptr": "*u8" if latent else "*bf16"}
    constants = {
        "GROUP": 128, "SPAN": tiles._span(128, tiling.columns), "MAX_CODE": 15, "QUANT": latent,
        "SYMMETRIC": latent, "LATENT": latent, "STORE": 0, "KEEP": latent, "PRECISION": tiling.precision,
        "R": 32, "TILE_M": tiling.rows, "TILE_N": tiling.columns,
    }  # fmt: skip
    return {
        "kernel": tiles._weight_kernel,
        "types": types,
        "constants": constants,
        "tiling": tiling,
        "fusion": False,
    }


def gradient(tiling: Tiling, product: bool) -> dict[str, Any]:
    types = {"dy_ptr": "*bf16", "x_ptr": "*bf16", "product_ptr": "*bf16", "keep_ptr": "*u8"}
    constants = {
        "MULTIPLY": not product, "WIDEN": False, "STRIP": tiling.strip, "DEPTH": tiling.depth, "R": 32,
        "TILE_M": tiling.rows, "TILE_N": tiling.columns, "BAND": 8,
    }  # fmt: skip
    return {
        "kernel": tiles._gradient_kernel,
        "types": types,
        "constants": constants,
        "tiling": tiling,
        "fusion": True,
    }


def built(
    capability: int, *, kernel: Any, types: Any, constants: Any, tiling: Tiling, fusion: bool
) -> dict[str, Any]:
    """What the compiler makes of one kernel, its operands aligned and their sides multiples of 16."""
    signature, values, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name) or POINTERS.get(name) or ("fp32" if name == "scaling" else "i32")
        if name not in ("scaling", "groups", "strips"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages, "enable_fp_fusion": fusion}
    found = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [TOOLS / tool, *more, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, more in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", []))
        )
    numbers = dict(part.split(":", 1) for part in usage.split() if part.startswith(("REG:", "STACK:")))
    return {
        "kernel": kernel.fn.__name__,
        "tiling": str(tiling),
        "registers": int(numbers["REG"]),
        "stack_bytes": int(numbers["STACK"]),
        "shared_bytes": found.metadata.shared,
        "tensor_cores": "HGMMA" in code or "HMMA" in code,
    }


def main() -> None:
    jobs = [weight(tiling, latent) for tiling in WEIGHT_TILINGS for latent in (False, True)]
    jobs += [gradient(tiling, False) for tiling in FUSED_TILINGS]
    jobs += [gradient(tiling, True) for tiling in PRODUCT_TILINGS]
    for job in jobs:
        print(json.dumps(built(int(sys.argv[1]), **job)), flush=True)


if __name__ == "__main__":
    main()
