"""Where the definition of a task of lm-evaluation-harness stands: in the harness, here, or in a user's file.

The harness finds a task by parsing all of its 14,000 definitions, some 20 seconds; here the one file that
defines the name is looked for, by its text.
"""

import difflib
import os
import re
from functools import cache
from pathlib import Path

from sqft.errors import DataError, require

__all__ = ["find_definition", "is_our_own"]

OWN = Path(__file__).parent
KEY = rb"^['\"]?%s['\"]?[ \t]*:[ \t]*"
DEFINES = re.compile(KEY % b"(task|group)" + rb"['\"]?([^\s'\"#\[\]{}]+)['\"]?[ \t]*(?:#.*)?$", re.MULTILINE)
TAGS = re.compile(KEY % b"tag" + rb"(\S[^\n]*|(?:\n[ \t]*-[^\n]*)+)", re.MULTILINE)


def find_definition(name: str) -> Path | None:
    """The YAML file that defines a task of this name; None for a group or a tag, which need the whole index.

    Raises: MissingExtraError without lm-eval; DataError for a name that is nowhere, with the nearest ones.
    """
    wanted = name.encode()
    for path in _by_likelihood(name):
        if (b"task", wanted) in _defined(path):
            return path
    known: set[str] = set()
    for path in _definitions():
        kinds = _defined(path)
        known.update(defined.decode(errors="replace") for _, defined in kinds)
        if (b"group", wanted) in kinds:
            return None
    if name in _tags():
        return None
    near = difflib.get_close_matches(name, sorted(known | _tags()), n=3, cutoff=0.6)
    hint = f"; the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else ""
    raise DataError(f"lm-eval knows no task {name}{hint}; see `lm-eval ls tasks`, or name a YAML file")


def is_our_own(path: Path) -> bool:
    """Whether a definition comes with this package."""
    return path.parent == OWN


def _by_likelihood(name: str) -> list[Path]:
    """All definitions, those first whose file or folder is called after the task."""

    def rank(path: Path) -> tuple[int, str]:
        if path.parent == OWN:
            return 0, path.name
        return 1 + (path.stem != name) + (path.parent.name != name), path.as_posix()

    return sorted(_definitions(), key=rank)


@cache
def _definitions() -> tuple[Path, ...]:
    """Every YAML file of the harness, and our own."""
    harness = Path(str(require("lm_eval", "eval").__file__)).parent / "tasks"
    found = [Path(folder) / file for folder, _, files in os.walk(harness) for file in files]
    return (*sorted(OWN.glob("*.yaml")), *(path for path in found if path.suffix == ".yaml"))


@cache
def _defined(path: Path) -> frozenset[tuple[bytes, bytes]]:
    """The (kind, name) pairs that a file defines at its outermost level."""
    return frozenset(DEFINES.findall(path.read_bytes()))


@cache
def _tags() -> frozenset[str]:
    """Every tag that a definition carries."""
    names: set[str] = set()
    for path in _definitions():
        for block in TAGS.findall(path.read_bytes()):
            names.update(word.decode(errors="replace") for word in re.findall(rb"[\w.-]+", block))
    return frozenset(names)
