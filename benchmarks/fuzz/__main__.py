"""Broken files of every kind that sqft reads: does each end right, or with one line and exit 2?

    python -m benchmarks.fuzz [--tries N] [--seconds S] [--seed N] [--only KIND] [--processes N] --json FILE

A try edits a whole file by a seed and runs a command on it, in a child forked from this warm process, with
limits of time and memory; `--processes` of them are started as processes of their own. Good is: one line
and exit 2, or a result that a reader of its own finds right (`judges.py`). Accepted nonsense is bad, and so
are a traceback, a hang, or memory beyond the limit. Seeds of bad tries are told and kept in the JSON;
`--one SEED` repeats one and keeps its files.
"""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

from benchmarks.campaign import Campaign, Tally, campaign_parser
from benchmarks.common import markdown_table, parse_options
from benchmarks.fuzz.edits import Editor
from benchmarks.fuzz.kinds import KINDS, Try
from benchmarks.fuzz.sources import Sources
from benchmarks.warm import Ended, import_everything, run_child

from sqft.cli import run_command_line

SECONDS, MEMORY = 20, 2 * 2**30  # of the processor, which other work on the machine does not take
TRIES = 10_000
OFTEN = {  # where others have one try: what ends fast, more often
    "recipes": 12, "adapters": 8, "packed": 8, "safetensors": 8, "certificates": 5, "configs": 3, "gguf": 3,
    "data": 3, "tables": 3, "tokenizers": 2,
}  # fmt: skip
WALL = 120
NONSENSE = 3
OUT_OF_MEMORY = "sqft: out of memory"


def one_try(
    sources: Sources, seed: str, folder: Path, *, process: bool = False, keep: bool = False
) -> tuple[str, str]:
    """(how it ended, what it said): "right", "refused", or what was bad of it."""
    _, kind, _ = seed.split(":")
    folder.mkdir(parents=True)
    made = KINDS[kind](sources, folder, Editor(random.Random(seed)))
    if process:
        ended = _run_process(made)
    else:
        ended = run_child(lambda: _work(made), processor_seconds=SECONDS, memory_bytes=MEMORY)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return _verdict(ended, made, kind), ended.said[-1500:]


def prepare(sources: Sources, kinds: list[str]) -> None:
    """Try a whole file of every kind, which must end right, here: so all that is loaded once is loaded."""
    import_everything()
    for kind in kinds:
        folder = sources.root / "whole"
        folder.mkdir()
        made = KINDS[kind](sources, folder, Editor(random.Random(kind), works=False))
        with redirect_stdout(StringIO()) as said, chdir(folder):
            code = _work(made)
        assert code == 0, f"{kind}: a whole file ends with {code}: {said.getvalue()}"
        shutil.rmtree(folder)


def _work(made: Try) -> int:
    os.chdir(made.edited.parent)  # where a path may lead that an edit made relative
    code = run_command_line(made.arguments)
    return _judged(made) if code == 0 else code


def _judged(made: Try) -> int:
    problem = made.judge()
    if problem is not None:
        print(f"NONSENSE: {problem}")
    return 0 if problem is None else NONSENSE


def _run_process(made: Try) -> Ended:
    started = time.monotonic()
    command = [sys.executable, "-m", "sqft", *made.arguments]
    try:
        done = subprocess.run(
            command, cwd=made.edited.parent, capture_output=True, text=True, errors="replace", timeout=WALL
        )
    except subprocess.TimeoutExpired:
        return Ended(-signal.SIGKILL, "", WALL, 0)
    said = done.stdout + done.stderr
    if done.returncode == 0:
        return run_child(lambda: _judged(made))
    return Ended(done.returncode, said, time.monotonic() - started, 0)


def _verdict(ended: Ended, made: Try, kind: str) -> str:
    if ended.code in (-signal.SIGKILL, -signal.SIGXCPU):
        return "hang"
    if ended.peak_bytes > MEMORY:
        return "memory"
    if ended.code == 2 and any(line.startswith(OUT_OF_MEMORY) for line in ended.complaints):
        return "refused" if kind in ("recipes", "settings") else "memory"  # what a user asked for, and got
    if ended.code == NONSENSE:
        return "nonsense"
    if ended.code in made.codes and "Traceback" not in ended.said:
        return "refused"
    if ended.is_clean:
        return "refused" if ended.code else "right"
    return "traceback" if "Traceback" in ended.said else f"exit {ended.code}"


def share_out(tries: int, kinds: list[str]) -> dict[str, int]:
    """Tries of each kind, in the proportions of OFTEN, at least so many together."""
    weights = {kind: OFTEN.get(kind, 1) for kind in kinds}
    return {kind: math.ceil(tries * weight / sum(weights.values())) for kind, weight in weights.items()}


def table(tallies: dict[str, Tally]) -> str:
    """One row a kind: tries, how they ended."""
    names = ("right", "refused")
    counts = {k: [t.tries, *(t.ends.get(n, 0) for n in names), len(t.bad)] for k, t in tallies.items()}
    together = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [[kind, *row] for kind, row in {**counts, "together": together}.items()]
    return markdown_table(["kind", "tries", *names, "bad"], rows)


def main() -> None:
    """Run the kinds and tell how their tries ended."""
    parser = campaign_parser(__doc__, list(KINDS), f"of all kinds together (default: {TRIES})")
    parser.add_argument("--processes", type=int, default=0, help="tries that are processes of their own")
    options = parse_options(parser)
    if options.one:
        import_everything()
        place = Path(tempfile.mkdtemp())
        print(*one_try(Sources(place), options.one, place / "try", keep=True), sep="\n")
        print(f"files: {place}")
        return
    kinds = options.only or list(KINDS)
    campaign = Campaign.open(options.json, options.seed, share_out(options.tries or TRIES, kinds))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sources = Sources(root)
        prepare(sources, kinds)
        for name, key in campaign.turns(options.seconds):
            process = campaign.tallies[name].tries * len(kinds) < options.processes
            end, said = one_try(sources, key, root / "try", process=process)
            campaign.note(name, key, end in ("right", "refused"), end, said)
    print(table(campaign.tallies))
    campaign.tell()


if __name__ == "__main__":
    main()
