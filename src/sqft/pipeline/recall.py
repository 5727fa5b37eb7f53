"""What planning found out once is kept: importing the libraries that find it takes seconds.

An answer lies in the user's cache under a digest of the question, which names everything that it hangs on:
contents of files, settings, versions, and in a development install the source that works it out.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sqft.artifacts import digest_json, read_object, seal, unseal, user_cache, write_json
from sqft.errors import first_line
from sqft.pipeline.sources import source_digest

__all__ = ["recall"]

logger = logging.getLogger(__name__)
# Whose releases may change an answer, or by being there or not make one.
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "compressed-tensors",
    "gguf",
    "xllamacpp",
    "openvino",
)
MOST = 400  # answers that are kept


def recall(name: str, question: Any, answer: Callable[[], Any], *, module: str) -> Any:
    """The answer to a question, JSON both: as it was found before, or else found now and kept.

    module: the one whose source, imports included, answers. What `answer` raises is not kept.
    """
    key = digest_json([name, question, source_digest(module), [_release(library) for library in LIBRARIES]])
    path = user_cache() / "plans" / f"{name}-{key[:24]}.json"
    with suppress(ValueError, KeyError):  # it is not there, or damaged
        return unseal(read_object(path))["answer"]
    found = answer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, seal({"answer": found}))
        _forget(path.parent)
    except OSError as error:
        logger.info("%s cannot be kept (%s)", path, first_line(error))
    return found


def _release(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _forget(directory: Path) -> None:
    """Remove the answers that were found longest ago, beyond the number that is kept."""
    by_age = sorted(directory.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in by_age[MOST:]:
        path.unlink(missing_ok=True)
