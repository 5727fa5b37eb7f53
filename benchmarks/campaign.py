"""Campaigns of many tries: whose turn it is, and what came of them, in a file that later calls add to.

A campaign that is stopped goes on where it stopped when the same command is run again: every try is drawn
from a seed of its own, SEED:NAME:NUMBER, and the file says how many of each name were made.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.common import check, checks_table, environment, make_parser, write_result

__all__ = ["Campaign", "Tally", "campaign_parser"]

SAVE_SECONDS = 5


def campaign_parser(description: str | None, names: list[str], tries: str) -> argparse.ArgumentParser:
    """The options that campaigns share. tries: what --tries counts."""
    parser = make_parser(description)
    parser.add_argument("--tries", type=int, help=tries)
    parser.add_argument("--seconds", type=float, default=3600, help="of this call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=names, action="append", metavar="NAME", help=", ".join(names))
    parser.add_argument("--one", metavar="SEED", help="repeat one try, as told by an earlier run")
    return parser


@dataclass
class Tally:
    """Tries of one name: how many, how those that were good ended, and the seeds of the others."""

    tries: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    bad: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Campaign:
    """wanted: how many tries of each name there shall be. file: where tallies are read from and kept."""

    seed: int
    wanted: Mapping[str, int]
    tallies: dict[str, Tally]
    calls: list[dict[str, Any]]
    file: Path | None
    saved: float = 0

    @classmethod
    def open(cls, file: Path | None, seed: int, wanted: Mapping[str, int]) -> Self:
        """Go on from a file, or begin; a file of another seed is refused."""
        tallies, calls = {name: Tally() for name in wanted}, []
        if file is not None and file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found.get("seed") != seed or "calls" not in found:
                sys.exit(f"{file} holds no campaign of seed {seed}: name another file")
            tallies |= {name: Tally(**tally) for name, tally in found["results"].items()}
            calls = found["calls"]
        return cls(seed, wanted, tallies, [*calls, {**environment(), "tries": 0, "seconds": 0.0}], file)

    def turns(self, seconds: float) -> Iterator[tuple[str, str]]:
        """(name, seed) of the tries that are missing, all names at the same pace, for so many seconds."""
        started = time.monotonic()
        while time.monotonic() < started + seconds:
            missing = {n: (self.tallies[n].tries + 1) / count for n, count in self.wanted.items() if count}
            name = min(missing, key=missing.__getitem__, default="")
            if not name or missing[name] > 1:
                break
            yield name, f"{self.seed}:{name}:{self.tallies[name].tries}"
            self.calls[-1]["tries"] += 1
            self.calls[-1]["seconds"] = round(time.monotonic() - started, 1)
            if time.monotonic() > self.saved + SAVE_SECONDS:
                self.save()
        self.save()

    def note(self, name: str, key: str, good: bool, end: str, what: str = "") -> None:
        """How a try ended: in a word and, if it is bad, in more, the last line of which is kept."""
        tally = self.tallies[name]
        tally.tries += 1
        if good:
            tally.ends[end] = tally.ends.get(end, 0) + 1
        else:
            tally.bad.append(
                {"seed": key, "end": end, "what": next(iter(what.strip().splitlines()[-1:]), "")}
            )
            print(f"BAD {key}: {end}: {what[-900:]}", flush=True)

    @property
    def checks(self) -> list[dict[str, Any]]:
        """One a name: every try that was made ended well."""
        return [
            check(f"{name}: good, of {t.tries}", t.tries - len(t.bad), at_least=t.tries)
            for name, t in self.tallies.items()
        ]

    def save(self) -> None:
        """Write the file."""
        self.saved = time.monotonic()
        results = {name: vars(tally) for name, tally in self.tallies.items()}
        write_result(
            self.file, {"seed": self.seed, "calls": self.calls, "results": results, "checks": self.checks}
        )

    def tell(self) -> None:
        """Print the table of what was wanted and what came of it."""
        print(checks_table(self.checks))
        for name, tally in self.tallies.items():
            ends = ", ".join(f"{end} {count}" for end, count in sorted(tally.ends.items()))
            print(f"{name}: {tally.tries} of {self.wanted.get(name, tally.tries)} tries: {ends}")
