"""A signature that only its key's owner can make."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.certificate import write_certificate
from sqft.certificate.signature import check_signature, sign_record
from sqft.errors import CertificateError
from tests.merged_models import MergedDirectories

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen here")


def make_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@pytest.fixture
def signed(merge_copy: Callable[..., MergedDirectories], tmp_path: Path) -> Path:
    merged = merge_copy().merged
    write_certificate(merged, [])
    sign_record(merged, make_key(tmp_path / "mine"))
    return merged


def test_what_was_signed_is_told_from_what_was_not(signed: Path, tmp_path: Path) -> None:
    assert "signed it" in check_signature(signed, tmp_path / "mine.pub")
    make_key(tmp_path / "other")
    with pytest.raises(CertificateError, match="differs from what the owner"):
        check_signature(signed, tmp_path / "other.pub")
    write_certificate(signed, [], trained_digest="edited, everything hashed anew")
    with pytest.raises(CertificateError, match="differs from what the owner"):
        check_signature(signed, tmp_path / "mine.pub")
    sign_record(signed, tmp_path / "other")
    with pytest.raises(CertificateError, match="differs from what the owner"):
        check_signature(signed, tmp_path / "mine.pub")
    (signed / "sqft_certificate.json.sig").unlink()
    with pytest.raises(CertificateError, match="is not signed"):
        check_signature(signed, tmp_path / "mine.pub")


def test_keys_that_are_none(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="is not a public ssh key"):
        check_signature(signed, tmp_path / "mine")
    with pytest.raises(CertificateError, match="cannot be read"):
        check_signature(signed, tmp_path / "none.pub")
    with pytest.raises(CertificateError, match="there is no key"):
        sign_record(signed, tmp_path / "none")
    (tmp_path / "text").write_text("no key")
    with pytest.raises(CertificateError, match="cannot be used to sign"):
        sign_record(signed, tmp_path / "text")
    with pytest.raises(CertificateError, match="no certificate to sign"):
        sign_record(tmp_path, tmp_path / "mine")
