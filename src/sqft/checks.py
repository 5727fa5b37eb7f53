"""What a check found, and what follows from one that failed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqft.errors import CertificateError, SqftError

__all__ = ["Check", "require_passed", "require_unchanged", "run_check"]


@dataclass(frozen=True)
class Check:
    """What was checked, whether it held, and the figures behind it."""

    name: str
    passed: bool
    detail: str = ""


def run_check(name: str, step: Callable[[], str]) -> Check:
    """The outcome of a step that returns what it found, or raises an SqftError for what is wrong."""
    try:
        return Check(name, True, step())
    except SqftError as error:
        return Check(name, False, str(error))
    except (
        Exception
    ) as error:  # a damaged file makes libraries raise anything; whatever it is, it is a failure
        message = next(iter(str(error).splitlines()), "")
        return Check(name, False, f"{type(error).__name__}: {message}")


def require_passed(checks: Sequence[Check], wrong: str | Path) -> None:
    """Raise one line that names every failed check.

    wrong: what a failure means, or the directory that then is not the model it should be.

    Raises: CertificateError if a check failed, or if there is none.
    """
    failed = [f"{check.name} ({check.detail})" for check in checks if not check.passed]
    if not checks:
        failed = ["nothing was checked"]
    if failed:
        meaning = f"{wrong} is not the model it should be" if isinstance(wrong, Path) else wrong
        raise CertificateError(f"{meaning}: {'; '.join(failed)}")


def require_unchanged(
    recorded: Mapping[str, str], found: Mapping[str, str], hidden: Iterable[str] = ()
) -> str:
    """Compare the digests of files, by name, with those that were recorded, and say how many are the same.

    hidden: files that have no digest and should not be there.

    Raises: CertificateError that names every file that is missing, was added or was changed.
    """
    problems = [f"{name} is missing" for name in sorted(recorded.keys() - found.keys())]
    problems += [f"{name} was added" for name in sorted(found.keys() - recorded.keys())]
    problems += [f"{name} was added, hidden" for name in hidden]
    shared = sorted(recorded.keys() & found.keys())
    problems += [f"{name} was changed" for name in shared if recorded[name] != found[name]]
    if problems or not recorded:
        raise CertificateError(", ".join(problems) or "no digests are recorded")
    return f"{len(recorded)} files unchanged"
