"""Which files a certificate covers."""

from pathlib import Path

from sqft.artifacts import CERTIFICATE, MANIFEST, digest_files
from sqft.certificate.answers import SIGNATURE

__all__ = ["file_digests"]

# Written after the certificate, and no part of a model.
UNCERTIFIED = {CERTIFICATE, SIGNATURE, MANIFEST, "README.md"}


def file_digests(directory: Path) -> dict[str, str]:
    """The sha256 of every file that a certificate covers."""
    return {name: digest for name, digest in digest_files(directory).items() if name not in UNCERTIFIED}
