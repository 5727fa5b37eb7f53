"""`sqft merge`."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqft.cli.options import AsJson, print_json
from sqft.sections import MergeSection

if TYPE_CHECKING:
    from sqft.foreign import MergeObserver, MergeResult
    from sqft.foreign.climb import RungResult
    from sqft.foreign.erasure import LayerErasure
    from sqft.progress import Progress

__all__ = ["merge"]

WORST = 8  # layers shown
DEFAULTS = MergeSection()
OPTIONS = {"polish_steps": "steps"}  # that are not called as their setting


def merge(
    base: Annotated[
        Path, typer.Option(help="GPTQ, AWQ, compressed-tensors or 16-bit (sparse) model directory.")
    ],
    adapter: Annotated[
        Path, typer.Option(help="A LoRA, rsLoRA or DoRA adapter in PEFT's files, or one that sqft trained.")
    ],
    output: Annotated[Path, typer.Option(help="Where to write the merged model.")],
    into: Annotated[str | None, typer.Option(help="Also export it: a format of sqft export.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Items to measure the loss on and to calibrate with: a file, a pattern such as "
            "data/*.csv, or hub:NAME.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Format string over an item's fields; default: by its form.")
    ] = None,
    answer: Annotated[str | None, typer.Option(help="Format string over an item's fields.")] = None,
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
    rungs: Annotated[str, typer.Option(help="Rungs to climb, in order.")] = ",".join(DEFAULTS.rungs),
    enough: Annotated[
        float, typer.Option(help="Stop at this share of the adapter's gain.")
    ] = DEFAULTS.enough,
    least: Annotated[
        float, typer.Option(help="Refuse below this share of the gain, or without --data of the update.")
    ] = DEFAULTS.least,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    items: Annotated[
        int, typer.Option(help="Items of the test split to measure the loss on, at most.")
    ] = 100,
    steps: Annotated[int, typer.Option(help="Steps of the polish.")] = DEFAULTS.polish_steps,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show what is erased of every layer, not only of the worst.")
    ] = False,
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="With --into: change the grid where the format needs it."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into a quantized or sparse base, and say how much of it survives.

    One that sqft trained, trained scales for instance, merges exactly, and the model gets its certificate.
    """
    from sqft.artifacts import read_object
    from sqft.cli.messages import RichProgress
    from sqft.directories import check_destination
    from sqft.export.table import find_format, require_runtime
    from sqft.models.beside import read_config

    section = _merge_section(
        rungs=[rung.strip() for rung in rungs.split(",")],
        enough=enough,
        least=least,
        trained_on=trained_on,
        dequantize=dequantize,
        polish_steps=steps,
    )
    read_config(base)
    exported_dir = output.with_name(f"{output.resolve().name}-{into}")
    if into is not None:
        find_format(into)
        require_runtime(into)
        check_destination(exported_dir, base, adapter, trained_on)
    if read_object(adapter / "adapter_config.json").get("peft_type") == "SQFT":
        _refuse_ignored({"--data": data, "--trained-on": trained_on, "--dequantize": dequantize})
        run_merge = partial(_merge_ours, base, adapter, output, silent=as_json)
    else:
        calibration, measure = _measurement(base, data, prompt, answer, items, samples, length)
        run_merge = partial(
            _merge_theirs, base, adapter, output, section, calibration, measure, None if as_json else layers
        )
    stdout = sys.stdout  # the bars take it over, which is right only where both are one terminal
    with RichProgress() as progress, redirect_stdout(sys.stdout if stdout.isatty() else stdout):
        found = run_merge(progress=progress)
        if into is not None:
            found["exported"] = _export(
                output, into, exported_dir, allow_requantize, progress, silent=as_json
            )
        if as_json:
            print_json(found)


def _merge_ours(
    base: Path, adapter: Path, output: Path, progress: "Progress", *, silent: bool
) -> dict[str, Any]:
    """Merge what sqft trained: exactly, so that there is nothing to measure, and with a certificate."""
    from sqft.pipeline.merging import merge_trained

    checks = merge_trained(base, adapter, output, progress=progress)
    if not silent:
        print(f"merged: {output}; certificate: {len(checks)} of {len(checks)} checks passed")
    return {"directory": output.name, "checks": checks}


def _merge_theirs(
    base: Path,
    adapter: Path,
    output: Path,
    section: MergeSection,
    calibration: Any,
    measure: Callable[[Any], float] | None,
    all_layers: bool | None,
    *,
    progress: "Progress",
) -> dict[str, Any]:
    """Merge what was trained elsewhere, rung by rung. all_layers: as --layers; None prints nothing at all."""
    from sqft.foreign import MergeObserver, merge_foreign

    result = merge_foreign(
        base,
        adapter,
        output,
        section,
        calibration=calibration,
        measure=measure,
        observer=MergeObserver() if all_layers is None else _printer(all_layers),
        progress=progress,
    )
    if all_layers is not None:
        _print_result(result)
    return result.as_dict()


def _refuse_ignored(options: dict[str, Any]) -> None:
    from sqft.errors import AdapterError

    given = " and ".join(name for name, value in options.items() if value)
    if given:
        raise AdapterError(f"{given} would be ignored: an adapter of sqft merges exactly; leave it out")


def _export(
    merged: Path, into: str, output: Path, allow_requantize: bool, progress: "Progress", *, silent: bool
) -> dict[str, Any]:
    from sqft.export import export_model

    exported = export_model(merged, into, output, allow_requantize=allow_requantize, progress=progress)
    if silent:
        return exported.as_dict()
    print(f"exported: {exported.directory}, {exported.code_comparison.changed} codes changed")
    if exported.damage is not None:
        damage = exported.damage
        print(f"requantized to {damage.grid}: {damage.changed} of {damage.weights} weights changed")
    for line in exported.serve:
        print(line)
    return exported.as_dict()


def _measurement(
    base: Path,
    data: str | None,
    prompt: str | None,
    answer: str | None,
    items: int,
    samples: int,
    length: int,
) -> tuple[Any, Callable[[Any], float] | None]:
    if data is None:
        return None, None
    from sqft.data import calibration_tokens, load_splits
    from sqft.errors import DataError
    from sqft.evaluation import evaluate_loss
    from sqft.models import load_tokenizer
    from sqft.sections import CalibrationSection, DataSection

    tokenizer = load_tokenizer(base)
    section = DataSection(train=data, prompt=prompt, answer=answer)
    splits = load_splits(section, tokenizer, seed=0)
    measured = splits.test[:items]
    if not measured:
        raise DataError(f"{data} has {len(splits.train)} items, too few to measure on; give more")
    texts = CalibrationSection(num_samples=samples, sequence_length=length)
    tokens = calibration_tokens(texts, splits.train, tokenizer, seed=0)
    return tokens, lambda model: evaluate_loss(model, measured).loss


def _print_erasure(layers: "list[LayerErasure]", shown: int) -> None:
    """What plain rounding would erase, layer by layer: all in their order, or the worst."""
    from sqft.cli.tables import print_table

    worst = layers if shown >= len(layers) else sorted(layers, key=lambda layer: -layer.erased)[:shown]
    rows = [
        [
            layer.name,
            f"{layer.erased:.1%}",
            f"{layer.masked:.1%}",
            f"{layer.changed:.2%}",
            "-" if layer.update_in_steps is None else f"{layer.update_in_steps:.3f}",
        ]
        for layer in worst
    ]
    mean = sum(layer.erased for layer in layers) / max(len(layers), 1)
    part = "" if len(worst) == len(layers) else f" ({len(worst)} worst shown, all with --layers)"
    rows.append([f"mean of {len(layers)} layers{part}", f"{mean:.1%}", "", "", ""])
    print_table(
        ["plain rounding erases", "of the update", "on zeros", "weights changed", "rms steps"], rows, left=1
    )


def _printer(all_layers: bool) -> "MergeObserver":
    from sqft.foreign import MergeObserver

    class Printer(MergeObserver):
        """Prints what is found when it is found."""

        def on_erasure(self, layers: "list[LayerErasure]") -> None:
            _print_erasure(layers, len(layers) if all_layers else WORST)

        def on_losses(self, base: float, unmerged: float, trained_on: float | None) -> None:
            print(f"\nloss of the base {base:.4f}, with the unmerged adapter {unmerged:.4f}", flush=True)
            if unmerged >= base:
                print(
                    "the adapter gains nothing on these items, so that there is no retention: give items of "
                    "its task, with the prompt that it was trained with",
                    flush=True,
                )
            if trained_on is not None:
                print(f"loss of the adapter on the base that it was trained on {trained_on:.4f}", flush=True)

        def on_rung(self, rung: "RungResult") -> None:
            loss = "not measured" if rung.loss is None else f"{rung.loss:.4f}"
            kept = "undefined" if rung.retention is None else f"{rung.retention:.1%}"
            print(f"rung {rung.name}: loss {loss}, retention {kept}", flush=True)

        def on_skipped(self, rung: str, reason: str) -> None:
            print(f"rung {rung} is skipped: {reason}", flush=True)

    return Printer()


def _merge_section(**values: Any) -> MergeSection:
    """Raises: RecipeError that names every option that is wrong."""
    from pydantic import ValidationError

    from sqft.errors import RecipeError

    try:
        return MergeSection(**values)
    except ValidationError as error:
        wrong = "; ".join(
            f"--{OPTIONS.get(str(item['loc'][0]), item['loc'][0])}: {item['msg']} (given {item['input']!r})"
            for item in error.errors()
        )
        raise RecipeError(wrong) from None


def _print_result(result: "MergeResult") -> None:
    from sqft.cli.tables import print_table
    from sqft.foreign.merge import SAME_ITEMS

    if result.base_loss is None or result.unmerged_loss is None:
        print("no data was given (--data): nothing was measured, and only the first rung was climbed")
        return
    rows = [
        [
            rung.name + (" (written)" if rung.name == result.chosen else ""),
            "-" if rung.loss is None else f"{rung.loss:.4f}",
            "undefined" if rung.retention is None else f"{rung.retention:.1%}",
        ]
        for rung in result.rungs
    ]
    print_table(["rung", "loss", "retention"], rows, left=1)
    print(SAME_ITEMS)
