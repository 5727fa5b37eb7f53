"""Models that nothing certifies: a merge of an adapter that sqft trained is what a certificate is about."""

from pathlib import Path

from sqft.artifacts import CERTIFICATE, FACTS, REFERENCE, read_object
from sqft.checks import Check, run_check
from sqft.errors import CertificateError
from sqft.marks import damaged_since, read_mark

__all__ = ["check_uncertified", "expects_certificate"]

MERGED = "merged"  # what sqft.json calls a merge


def expects_certificate(directory: Path) -> bool:
    """Whether a model is certified, or by what it holds was: then a certificate that is gone is a failure."""
    parts = (CERTIFICATE, REFERENCE)
    return any((directory / name).exists() for name in parts) or (
        read_object(directory / FACTS).get("kind") == MERGED
    )


def check_uncertified(directory: Path) -> list[Check]:
    """What can be told of a model that no certificate is about: that its files changed since sqft wrote them.

    Raises: CertificateError if they did not, or if sqft did not write them: there is nothing to verify.
    """
    if not (directory / "config.json").is_file():
        raise CertificateError(
            f"{directory} holds no model; name a merged model, an export or a packed model"
        )
    mark = read_mark(directory)
    written = mark is not None and bool(mark.files)
    check = run_check("files", lambda: _unchanged(directory))
    if not check.passed:
        return [check]
    state = "its files are as sqft wrote them" if written else "sqft did not write it"
    raise CertificateError(
        f"{directory} carries no certificate, as no adapter that sqft trained was merged into it; {state}"
    )


def _unchanged(directory: Path) -> str:
    changed = damaged_since(directory)
    if changed is not None:
        raise CertificateError(f"{changed} is not as sqft wrote it")
    return "as they were written"
