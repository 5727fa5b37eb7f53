"""Which kernel a shape gets on a card: the one table that measurements on GPUs fill.

`choices.json` has a row for each compute capability, kind of base and shape that was measured
(`python -m benchmarks.gpu.choose FILE` writes it from the results of `make gpu`). A card whose capability has
no row gets torch. Another shape gets the row that is nearest in its sides' logarithms.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

__all__ = [
    "CHUNK_ELEMENTS",
    "GRADIENT_TILING",
    "PRODUCT_TILING",
    "TORCH",
    "WEIGHT_TILING",
    "Choice",
    "Tiling",
    "choose_kernels",
    "choose_loss",
    "table_row",
]

# Logits that exist at a time. A chunk reads the output layer twice, so a GPU needs many tokens in one to be
# bound by its products: 2^26 are 512 tokens of 128 k logits, 0.8 GB in all their forms. A CPU keeps 16 MiB.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work.

    rows, columns: of a tile of the weight; depth: tokens multiplied at a time; warps, stages: as in Triton;
    strip: tiles of rows that one program contracts, which divides the partial sums of dA; precision: how the
    float32 product of the factors is taken, ieee or tf32x3 (three products on the tensor cores, about as
    exact).
    """

    rows: int
    columns: int
    depth: int = 64
    warps: int = 4
    stages: int = 2
    strip: int = 1
    precision: Literal["ieee", "tf32x3"] = "ieee"


WEIGHT_TILING = Tiling(64, 128)
GRADIENT_TILING = Tiling(128, 128, warps=8, stages=3)
PRODUCT_TILING = Tiling(128, 128, warps=8, strip=4)


@dataclass(frozen=True)
class Choice:
    """What builds the weight, and what contracts its gradient; None is torch.

    product: the gradient of the weight is multiplied by torch and read once, in place of being multiplied in
    the kernel. The gradient's kernel needs what the weight's finds out: it is never without it.
    """

    weight: Tiling | None = None
    gradient: Tiling | None = None
    product: bool = False


TORCH = Choice()


def choose_kernels(capability: str, shape: tuple[int, int], *, quantized: bool, wanted: str) -> Choice:
    """The kernels of a weight (out, in) on a card of a compute capability such as "9.0".

    wanted: torch; auto, what the table says; triton, what the table says, and the tilings that were compiled
    for where it says torch or nothing.
    """
    if wanted == "torch":
        return TORCH
    row = _nearest(capability, shape, quantized)
    found = TORCH if row is None else row
    if wanted == "auto":
        return found
    if found.gradient is None:
        return Choice(found.weight or WEIGHT_TILING, GRADIENT_TILING)
    return found if found.weight else Choice(WEIGHT_TILING, found.gradient, found.product)


def choose_loss(capability: str) -> Literal["torch", "liger"]:
    """What takes the chunked loss on a card."""
    return "liger" if _table()["loss"].get(capability) == "liger" else "torch"


def table_row(capability: str, shape: tuple[int, int], quantized: bool, choice: Choice) -> dict[str, Any]:
    """A row of the table as it is stored."""
    return {"capability": capability, "shape": list(shape), "quantized": quantized} | asdict(choice)


@lru_cache
def _table() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(files("sqft.kernels").joinpath("choices.json").read_text("utf-8"))
    return values


@lru_cache
def _nearest(capability: str, shape: tuple[int, int], quantized: bool) -> Choice | None:
    def distance(row: dict[str, Any]) -> float:
        return sum(abs(math.log(mine / its)) for mine, its in zip(shape, row["shape"], strict=True))

    rows = [r for r in _table()["rows"] if r["capability"] == capability and r["quantized"] == quantized]
    if not rows:
        return None
    row = min(rows, key=distance)
    tilings = {key: None if row[key] is None else Tiling(**row[key]) for key in ("weight", "gradient")}
    return Choice(**tilings, product=row["product"])
