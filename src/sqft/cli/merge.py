"""`sqft merge`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sqft.export import MergeResult
    from sqft.export.erasure import LayerErasure
    from sqft.export.merging import RungResult

__all__ = ["merge"]


def merge(
    base: Annotated[
        Path, typer.Option(help="GPTQ, AWQ, compressed-tensors or 16-bit (sparse) model directory.")
    ],
    adapter: Annotated[Path, typer.Option(help="A LoRA, rsLoRA or DoRA adapter in PEFT's files.")],
    output: Annotated[Path, typer.Option(help="Where to write the merged model.")],
    into: Annotated[str | None, typer.Option(help="Also export it: a format of sqft export.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Items (.jsonl) to measure the loss on and to calibrate with.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Format string over an item's fields.")] = "{question}",
    answer: Annotated[str, typer.Option(help="Format string over an item's fields.")] = "{answer}",
    trained_on: Annotated[
        str | None,
        typer.Option(
            metavar="[nf4:]DIR",
            help="The base that the adapter was trained on, if it is another one: measured too. For QLoRA a "
            "directory in NF4, or nf4:DIR for a 16-bit one that was quantized on loading.",
        ),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Take a GPTQ, AWQ or NF4 base as 16-bit weights.")
    ] = False,
    rungs: Annotated[str, typer.Option(help="Rungs to climb, in order.")] = "round,feedback,refit,polish",
    enough: Annotated[float, typer.Option(help="Stop at this share of the adapter's gain.")] = 0.95,
    least: Annotated[float, typer.Option(help="Refuse the merge below this share.")] = 0.5,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps of the polish.")] = 60,
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="With --into: change the grid where the format needs it."),
    ] = False,
) -> None:
    """Merge an adapter trained elsewhere into a quantized or sparse base, and say how much of it survives."""
    from sqft.cli.messages import RichProgress
    from sqft.errors import ExportError
    from sqft.export import FORMATS, export_model, merge_foreign
    from sqft.export.destination import check_destination
    from sqft.export.formats import require_runtime

    exported_dir = output.with_name(f"{output.resolve().name}-{into}")
    if into is not None:
        if into not in FORMATS:
            raise ExportError(f"format '{into}' is unknown; choose from {', '.join(FORMATS)}")
        require_runtime(into)
        check_destination(exported_dir, base, adapter, trained_on)
    calibration, measure = _measurement(base, data, prompt, answer, samples, length)
    with RichProgress() as progress:
        result = merge_foreign(
            base,
            adapter,
            output,
            calibration=calibration,
            measure=measure,
            trained_on=trained_on,
            dequantize=dequantize,
            rungs=rungs.split(","),
            enough=enough,
            least=least,
            polish_steps=steps,
            on_erasure=_print_erasure,
            on_rung=_print_rung,
            progress=progress,
        )
        _print_result(result)
        if into is not None:
            exported = export_model(
                output, into, exported_dir, allow_requantize=allow_requantize, progress=progress
            )
            print(f"exported: {exported.directory}, {exported.code_comparison.changed} codes changed")
            if exported.damage is not None:
                damage = exported.damage
                print(f"requantized to {damage.grid}: {damage.changed} of {damage.weights} weights changed")
            for line in exported.serve:
                print(line)


def _measurement(
    base: Path, data: Path | None, prompt: str, answer: str, samples: int, length: int
) -> tuple[Any, Callable[[Any], float] | None]:
    if data is None:
        return None, None
    from sqft.data import calibration_tokens, load_splits
    from sqft.evaluation import evaluate_loss
    from sqft.models import load_tokenizer
    from sqft.sections import CalibrationSection, DataSection

    tokenizer = load_tokenizer(base)
    section = DataSection(train=str(data), prompt=prompt, answer=answer, test_items=100, search_items=1)
    items = load_splits(section, tokenizer, seed=0).test
    texts = CalibrationSection(num_samples=samples, sequence_length=length)
    tokens = calibration_tokens(texts, section, tokenizer, seed=0)
    return tokens, lambda model: evaluate_loss(model, items).loss


def _print_erasure(layers: "list[LayerErasure]") -> None:
    """What plain rounding would erase, layer by layer, before the first rung is climbed."""
    from sqft.cli.tables import print_table

    rows = [
        [
            layer.name,
            f"{layer.erased:.1%}",
            f"{layer.masked:.1%}",
            f"{layer.changed:.2%}",
            "-" if layer.update_in_steps is None else f"{layer.update_in_steps:.3f}",
        ]
        for layer in layers
    ]
    mean = sum(layer.erased for layer in layers) / max(len(layers), 1)
    rows.append([f"mean of {len(layers)} layers", f"{mean:.1%}", "", "", ""])
    print_table(
        ["plain rounding erases", "of the update", "on zeros", "weights changed", "rms steps"], rows, left=1
    )


def _print_rung(rung: "RungResult") -> None:
    loss = "not measured" if rung.loss is None else f"{rung.loss:.4f}"
    kept = "undefined" if rung.retention is None else f"{rung.retention:.1%}"
    print(f"rung {rung.name}: loss {loss}, retention {kept}", flush=True)


def _print_result(result: "MergeResult") -> None:
    from sqft.cli.tables import print_table

    for rung, reason in result.skipped.items():
        print(f"rung {rung} was skipped: {reason}")
    if result.base_loss is None or result.unmerged_loss is None:
        print("no data was given (--data): nothing was measured, and only the first rung was climbed")
        return
    print(f"\nloss of the base {result.base_loss:.4f}, with the unmerged adapter {result.unmerged_loss:.4f}")
    if result.trained_on_loss is not None:
        print(f"loss of the adapter on the base that it was trained on {result.trained_on_loss:.4f}")
    rows = [
        [
            rung.name + (" (written)" if rung.name == result.chosen else ""),
            "-" if rung.loss is None else f"{rung.loss:.4f}",
            "undefined" if rung.retention is None else f"{rung.retention:.1%}",
        ]
        for rung in result.rungs
    ]
    print_table(["rung", "loss", "retention"], rows, left=1)
    print("the rung was chosen by these losses: on the same items, so the best is told slightly too well")
