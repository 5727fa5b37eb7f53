"""One line of a certificate, and what follows from a line that failed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqft.artifacts import CERTIFICATE, MANIFEST, digest_files
from sqft.certificate.answers import SIGNATURE
from sqft.errors import CertificateError, SqftError

__all__ = ["Check", "file_digests", "require_passed", "run_check"]

UNCERTIFIED = {
    CERTIFICATE,
    SIGNATURE,
    MANIFEST,
    "README.md",
}  # written after the certificate, and no part of a model


@dataclass(frozen=True)
class Check:
    """What was checked, whether it held, and the figures behind it."""

    name: str
    passed: bool
    detail: str


def require_passed(checks: Sequence[Check], directory: Path) -> None:
    """Raise one line that names every failed check.

    Raises: CertificateError if a check failed, or if there is none.
    """
    failed = [f"{check.name} ({check.detail})" for check in checks if not check.passed]
    if not checks:
        failed = ["nothing was checked"]
    if failed:
        raise CertificateError(f"{directory} is not the model it should be: {'; '.join(failed)}")


def run_check(name: str, step: Callable[[], str]) -> Check:
    """The outcome of a step that returns what it found, or raises CertificateError for what is wrong."""
    try:
        return Check(name, True, step())
    except SqftError as error:
        return Check(name, False, str(error))
    except Exception as error:  # a damaged file makes libraries raise anything, and is no pass whatever it is
        message = next(iter(str(error).splitlines()), "")
        return Check(name, False, f"{type(error).__name__}: {message}")


def file_digests(directory: Path) -> dict[str, str]:
    """The sha256 of every file that a certificate covers."""
    return {name: digest for name, digest in digest_files(directory).items() if name not in UNCERTIFIED}
