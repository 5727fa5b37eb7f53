"""`sqft inspect`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqft.artifacts import FACTS
from sqft.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from sqft.models import Checkpoint

__all__ = ["LayerFacts", "inspect", "inspect_layers"]


@dataclass(frozen=True)
class LayerFacts:
    """What a model directory says about one linear layer.

    mask_sparsity, error: None where nothing is recorded. pattern: of the mask, None where it has none.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    mask_sparsity: float | None
    pattern: str | None
    stored_as: str
    size_bytes: int
    error: float | None


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="One row for each layer, not for each kind.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show zeros, mask, pattern, grid, error and size of the linear layers, embedding and head of a model."""
    from sqft.cli.messages import RichProgress
    from sqft.cli.tables import print_table
    from sqft.models import head_weights, open_checkpoint
    from sqft.progress import track
    from sqft.report.summary import format_bytes

    checkpoint = open_checkpoint(directory)
    with RichProgress() as progress:
        names = [name for name in checkpoint.linears if name.startswith(checkpoint.block_names)]
        names += [name.removesuffix(".weight") for name in head_weights(checkpoint.skeleton())]
        facts = list(inspect_layers(checkpoint, track(names, "reading layers", progress)))
    if as_json:
        print_json({"facts": _read_facts(directory / FACTS), "layers": facts})
        return
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    kind, blocks = checkpoint.config.model_type, len(checkpoint.block_names)
    print(f"{directory}: {kind}, {blocks} blocks, {format_bytes(total)}")
    for key, value in _read_facts(directory / FACTS).items():
        if isinstance(value, str | int | float):
            print(f"{key}: {value}")
    groups: dict[str, list[LayerFacts]] = {}
    for fact in facts:
        title = fact.name if layers else ".".join(fact.name.split(".")[-2:])
        groups.setdefault(f"{title}|{fact.shape}|{fact.stored_as}", []).append(fact)
    rows = [
        [
            title.split("|")[0],
            str(len(group)),
            f"{group[0].shape[0]} x {group[0].shape[1]}",
            group[0].stored_as,
            _percent([fact.zeros for fact in group]),
            _percent([fact.mask_sparsity for fact in group]),
            ", ".join(sorted({fact.pattern or "-" for fact in group})),
            _mean([fact.error for fact in group]),
            format_bytes(sum(fact.size_bytes for fact in group)),
        ]
        for title, group in groups.items()
    ]
    print_table(["linear", "count", "shape", "stored as", "zeros", "mask", "pattern", "error", "size"], rows)


def inspect_layers(checkpoint: "Checkpoint", names: Iterator[str]) -> Iterator[LayerFacts]:
    """The facts of the named linears, embedding and head, read one at a time."""
    from sqft.models import StoredMasks
    from sqft.ops.head_grid import HEAD_GROUP, head_codes
    from sqft.ops.pattern import find_pattern

    masks = StoredMasks(checkpoint.directory)
    errors = _recorded_errors(checkpoint.directory)
    for name in names:
        weight, mask = checkpoint.weight(name), masks.get(name)
        tensors = [t for t in checkpoint.names if t.startswith(f"{name}.")]
        stored_as = str(checkpoint.dtype(tensors[0])).removeprefix("torch.")
        if name in checkpoint.quantized_names and checkpoint.grid is not None:
            grid = checkpoint.grid
            groups = "rows" if grid.group_size == -1 else f"groups of {grid.group_size}"
            stored_as = f"INT{grid.bits}, {groups}, {'symmetric' if grid.symmetric else 'asymmetric'}"
        elif not name.startswith(checkpoint.block_names) and head_codes(weight) is not None:
            place = "" if checkpoint.stored_as_steps(f"{name}.weight") else ", in float16"
            stored_as = f"INT8, groups of {HEAD_GROUP}, symmetric{place}"
        yield LayerFacts(
            name,
            (weight.shape[0], weight.shape[1]),
            float((weight == 0).float().mean()),
            None if mask is None else 1 - float(mask.float().mean()),
            None if mask is None else find_pattern(mask),
            stored_as,
            sum(_tensor_bytes(checkpoint, t) for t in tensors),
            errors.get(name),
        )


def _tensor_bytes(checkpoint: "Checkpoint", name: str) -> int:
    steps = checkpoint.stored_as_steps(name)  # a byte each, and a scale of two bytes for every 32
    count: float = 1 + 2 / 32 if steps else checkpoint.dtype(name).itemsize
    for size in checkpoint.shape(name):
        count *= size
    return int(count)


def _read_facts(path: Path) -> dict[str, Any]:
    """Read one of sqft's JSON files beside the weights; empty if there is none."""
    from sqft.errors import ModelError

    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}); write the model again") from None
    return values if isinstance(values, dict) else {}


def _recorded_errors(directory: Path) -> dict[str, float]:
    """Relative errors as the compression that wrote the model measured them."""
    from sqft.artifacts import LAYERS

    rows = _read_facts(directory / LAYERS).get("layers", [])
    return {row["name"]: row["error"] for row in rows if row.get("error") is not None}


def _percent(values: list[float] | list[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    return f"{low:.1f} %" if high - low < 0.05 else f"{low:.1f}-{high:.1f} %"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4f}" if known else "-"
