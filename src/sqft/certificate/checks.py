"""One line of a certificate, and what follows from a line that failed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqft.errors import CertificateError

__all__ = ["Check", "require_passed"]


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
