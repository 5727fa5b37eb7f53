"""Everything that is to be measured on a GPU, in order of worth, in the time there is.

    python -m benchmarks.gpu [--minutes 9] --json FILE [--parts facts,training,...] [--dry]

Each part runs in a process of its own, within its time box. What is finished is in FILE at once; a part that
fails leaves its error there, and the next one starts. Ends with tables in Markdown. `--dry` runs every part
at tiny sizes on a CPU, Triton's kernels in its interpreter: the figures mean nothing then.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import environment, make_parser, parse_options, write_result
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.tables import collect_checks, markdown

RESTARTS = 3  # of a part whose process dies, each without the row in which it died
POLL_SECONDS = 0.2


def main() -> None:
    """Measure, and write the JSON after every row."""
    names = [part.name for part in PARTS]
    parser = make_parser(__doc__, json_required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop, from now (default 9)")
    parser.add_argument("--parts", default=",".join(names), help="which of " + ", ".join(names))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    options = parse_options(parser)
    unknown = set(options.parts.split(",")) - set(names)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    end = time.monotonic() + 60 * options.minutes - 5
    if not options.dry and not torch.cuda.is_available():
        parser.error(
            f"torch {torch.__version__} sees no GPU here; --dry runs every part at tiny sizes on a CPU"
        )
    result: dict[str, Any] = {"environment": environment(), "dry": options.dry, "parts": {}}
    for part in PARTS:
        if part.name in options.parts.split(","):
            run_part(part, end, result, options)
    save(result, options.json)
    print(markdown(result))


def run_part(part: Part, end: float, result: dict[str, Any], options: Any) -> None:
    """Run one part in children until it ends, its time is over, or it dies too often."""
    seconds = min(part.seconds, end - time.monotonic())
    found: dict[str, Any] = {"about": part.about, "rows": [], "error": None}
    result["parts"][part.name] = found
    if seconds < part.least and not options.dry:
        found["error"] = f"not begun: {max(seconds, 0):.0f} s were left, it wants {part.least} s"
        return
    print(f"{part.name}: {part.about}, at most {seconds:.0f} s", file=sys.stderr)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        rows, log = Path(directory) / "rows.jsonl", Path(directory) / "log"
        for _ in range(RESTARTS):
            code = run_child(part, started + seconds, rows, log, result, options)
            if code == 0 or time.monotonic() > started + seconds - part.least / 2:
                break
        found["error"] = None if code == 0 else describe(code, seconds, log)
    found["seconds"] = round(time.monotonic() - started, 1)
    save(result, options.json)


def run_child(
    part: Part, end: float, rows: Path, log: Path, result: dict[str, Any], options: Any
) -> int | None:
    """One process of a part; None if it was stopped at the end of its time."""
    begun = [line["begin"] for line in read_lines(rows) if "begin" in line]
    command = [sys.executable, "-m", "benchmarks.gpu.child", part.name, str(rows)]
    command += ["--dry"] * options.dry + (["--skip", *begun] if begun else [])
    with log.open("ab") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            known = 0
            while (code := child.poll()) is None and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
                known = take_rows(part, rows, known, result, options)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    take_rows(part, rows, known, result, options)
    return code


def take_rows(part: Part, rows: Path, known: int, result: dict[str, Any], options: Any) -> int:
    """Put new rows into the result, and say them; returns how many lines there are."""
    lines = read_lines(rows)
    if len(lines) == known:
        return known
    finished = {line["row"]: line for line in lines if "row" in line}
    for line in lines:
        if "begin" in line and line["begin"] not in finished:
            unfinished = {"row": line["begin"], "error": "its process ended before it did"}
            finished.setdefault(line["begin"], unfinished)
    for line in lines[known:]:
        if "row" in line:
            print(f"  {line['row']}: {line.get('error') or str(line['seconds']) + ' s'}", file=sys.stderr)
    result["parts"][part.name]["rows"] = list(finished.values())
    save(result, options.json)
    return len(lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def describe(code: int | None, seconds: float, log: Path) -> str:
    """Why a part ended, with the last lines it wrote."""
    tail = " | ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-6:])[-800:]
    reason = f"stopped after its {seconds:.0f} s" if code is None else f"ended with {code}"
    return f"{reason}: {tail}"


def save(result: dict[str, Any], path: Path) -> None:
    """Write what is measured so far, its aims among it."""
    result["checks"] = collect_checks(result)
    write_result(path, result)


if __name__ == "__main__":
    main()
