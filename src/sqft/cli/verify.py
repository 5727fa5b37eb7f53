"""`sqft verify`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqft.artifacts import EXPORT_RECORD, PACK_RECORD
from sqft.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from sqft.certificate import Check

__all__ = ["verify"]


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A merged model.")],
    base: Annotated[
        Path | None, typer.Option(help="The sparse or quantized model that the adapter was trained on.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="The adapter that was merged.")] = None,
    merged: Annotated[
        Path | None, typer.Option(help="For what sqft export wrote: the model that was exported.")
    ] = None,
    signed_by: Annotated[
        Path | None, typer.Option(help="The public ssh key of whoever signed it with sqft sign.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Repeat the certificate of a merged model; with --base and --adapter, also recompute its weights.

    What sqft export wrote is checked against its digests; with --merged, code by code too. What sqft pack
    wrote is checked to give every file back that was certified; `sqft unpack` it to repeat the rest. With
    --signed-by, also that the owner of that key signed what the files are checked against.
    Exits with 1 if a check fails, and with 2 if there is nothing to check: only a model that an adapter was
    merged into has a certificate.
    """
    from sqft.certificate import check_integrity, check_provenance
    from sqft.certificate.signature import check_signature
    from sqft.certificate.uncertified import check_uncertified, expects_certificate
    from sqft.checks import run_check
    from sqft.cli.messages import RichProgress
    from sqft.errors import CertificateError

    for path in (directory, base, adapter, merged):
        if path is not None and not path.is_dir():
            raise CertificateError(f"there is no directory {path}")
    if (base is None) != (adapter is None):
        raise CertificateError("give both --base and --adapter, or neither")
    exported = (directory / EXPORT_RECORD).is_file()
    packed = (directory / PACK_RECORD).is_file()
    if merged is not None and not exported:
        raise CertificateError(f"{directory} was not written by sqft export, so --merged does not apply")
    with RichProgress() as progress:
        if exported:
            checks = _export_checks(directory, merged)
        elif packed:
            checks = _pack_checks(directory)
        elif base is None and signed_by is None and not expects_certificate(directory):
            checks = check_uncertified(directory)
        else:
            checks = check_integrity(directory, progress, trust_remote_code=trust_remote_code)
        if base is not None and adapter is not None:
            checks += check_provenance(directory, base, adapter, progress=progress)
        if signed_by is not None:
            checks.append(run_check("signature", lambda: check_signature(directory, signed_by)))
    failed = sum(not check.passed for check in checks)
    if as_json:
        print_json({"directory": directory, "passed": not failed, "checks": checks})
        raise typer.Exit(1 if failed else 0)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'passed' if check.passed else 'FAILED'}  {check.name:<{width}}  {check.detail}".rstrip())
    level = "integrity" if base is None else "integrity and provenance"
    level = "export" if exported else "pack" if packed else level
    verdict = "FAILED" if failed else "passed"
    print(f"{directory}: {level} {verdict}, {len(checks) - failed} passed, {failed} failed")
    if failed:
        raise typer.Exit(1)


def _export_checks(directory: Path, merged: Path | None) -> list["Check"]:
    from sqft.export.verification import check_export

    return check_export(directory, merged)


def _pack_checks(directory: Path) -> list["Check"]:
    """Of a packed directory: its files are unchanged, and give back what was certified."""
    from sqft.artifacts import CERTIFICATE
    from sqft.certificate.stored import read_json
    from sqft.checks import run_check
    from sqft.errors import CertificateError
    from sqft.formats.packed import check_packed, check_restored

    def certified() -> str:
        if not (directory / CERTIFICATE).is_file():
            return "the model that was packed carries no certificate"
        restored = check_restored(directory)
        files = read_json(directory / CERTIFICATE).get("files", {})
        wrong = sorted(name for name, digest in files.items() if restored.get(name) != digest)
        if wrong or not files:
            raise CertificateError(f"not as certified: {', '.join(wrong) or 'no digests are recorded'}")
        return f"{len(files)} files come back as they were certified"

    steps: list[tuple[str, Callable[[], str]]] = [
        ("files", lambda: f"{len(check_packed(directory)['files'])} files unchanged"),
        ("originals", lambda: f"{len(check_restored(directory))} files come back bit for bit"),
        ("certificate", certified),
    ]
    return [run_check(name, step) for name, step in steps]
