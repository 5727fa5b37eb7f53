"""Checking an artefact again, long after it was exported."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqft.artifacts import digest_files
from sqft.errors import ExportError, SqftError
from sqft.export.exporting import EXPORT, check_stored
from sqft.export.source import open_source

__all__ = ["Finding", "check_export"]


@dataclass(frozen=True)
class Finding:
    """What was checked, whether it held, and the figures behind it."""

    name: str
    passed: bool
    detail: str


def check_export(directory: Path, merged_dir: Path | None = None) -> list[Finding]:
    """Check an artefact's files against the digests taken when it was exported.

    merged_dir: the model that was exported; then every code is read back and compared with it too.
    """
    steps: list[tuple[str, Callable[[], str]]] = [("digests", lambda: _check_digests(directory))]
    if merged_dir is not None:
        steps.append(("codes", lambda: _check_codes(directory, merged_dir)))
    findings = []
    for name, step in steps:
        try:
            findings.append(Finding(name, True, step()))
        except SqftError as error:
            findings.append(Finding(name, False, str(error)))
        except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:  # damaged files
            findings.append(Finding(name, False, f"{type(error).__name__}: {error}".splitlines()[0]))
    return findings


def _check_digests(directory: Path) -> str:
    recorded = json.loads((directory / EXPORT).read_text(encoding="utf-8"))["files"]
    found = digest_files(directory)
    for ours in (EXPORT, "README.md", "manifest.json"):
        recorded.pop(ours, None)
        found.pop(ours, None)
    problems = [f"{name} is missing" for name in sorted(recorded.keys() - found.keys())]
    problems += [f"{name} was added" for name in sorted(found.keys() - recorded.keys())]
    problems += [
        f"{n} was changed" for n in sorted(recorded.keys() & found.keys()) if recorded[n] != found[n]
    ]
    if problems or not recorded:
        raise ExportError(", ".join(problems) or "no digests are recorded")
    return f"{len(recorded)} files unchanged"


def _check_codes(directory: Path, merged_dir: Path) -> str:
    record = json.loads((directory / EXPORT).read_text(encoding="utf-8"))
    if record.get("adapter"):
        raise ExportError("an adapter is no merged model; verify it without --merged")
    if record.get("damage"):
        raise ExportError("the artefact was requantized, so its codes are not those of the merged model")
    source = open_source(merged_dir)
    head = record.get("head_option", "auto")
    compared = check_stored(source, directory, record["format"], head_type=head)
    rounded = "" if head == "auto" else f", embedding and head rounded to {head}"
    return f"{compared.codes} codes and {compared.weights} other weights equal the merged model's{rounded}"
