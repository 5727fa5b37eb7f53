"""`sqft sign`."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["sign"]


def sign(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A merged model, or an export.")],
    key: Annotated[
        Path, typer.Option(help="Your private ssh key, or the public one of a key that ssh-agent holds.")
    ] = Path("~/.ssh/id_ed25519"),
) -> None:
    """Sign a model's certificate with your ssh key, so that nobody else can change what it covers.

    Check it anywhere with: sqft verify DIR --signed-by KEY.pub
    """
    from sqft.certificate.signature import sign_record
    from sqft.errors import CertificateError

    if not directory.is_dir():
        raise CertificateError(f"there is no directory {directory}")
    print(f"signed: {sign_record(directory, key)}")
