"""A detached signature over a certificate, with a key that the user has: OpenSSH's `ssh-keygen -Y`.

Digests reveal accidents, but whoever edits a model can compute new ones. A signature over the file that holds
the digests cannot be made without the signer's key. Most people have an ssh key already, and most systems can
check its signatures.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from sqft.artifacts import CERTIFICATE, EXPORT_RECORD
from sqft.errors import CertificateError, MissingExtraError

__all__ = ["check_signature", "sign_record", "signed_record"]

NAMESPACE = "sqft"
SIGNER = "signer"
RECORDS = (EXPORT_RECORD, CERTIFICATE)  # the files that hold the digests of all others
SECONDS = 300  # a passphrase is typed, a hardware key touched


def signed_record(directory: Path) -> Path:
    """The file of a directory that is signed: its certificate, or the record of an export.

    Raises: CertificateError if it has neither.
    """
    for name in RECORDS:
        if (directory / name).is_file():
            return directory / name
    raise CertificateError(f"{directory} has no certificate to sign: it is not a merged model and no export")


def sign_record(directory: Path, key: Path) -> Path:
    """Sign what certifies a directory with an ssh key, or with the agent's if `key` is a public one.

    Returns the signature's path.

    Raises: CertificateError if there is nothing to sign or ssh-keygen refuses.
    """
    record = signed_record(directory)
    if not key.expanduser().is_file():
        raise CertificateError(f"there is no key {key}; make one with: ssh-keygen -t ed25519 -f {key}")
    signature = record.with_name(record.name + ".sig")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copyfile(record, Path(folder) / record.name))
        done = _ssh_keygen("sign", "-f", str(key.expanduser()), "-n", NAMESPACE, str(copy))
        if done.returncode:
            raise CertificateError(f"{key} cannot be used to sign: {_last_line(done.stderr)}")
        shutil.copyfile(copy.with_name(copy.name + ".sig"), signature)
    return signature


def check_signature(directory: Path, public_key: Path) -> str:
    """Check that what certifies a directory was signed by the owner of a public key, and is unchanged since.

    Raises: CertificateError if it was not.
    """
    record = signed_record(directory)
    signature = record.with_name(record.name + ".sig")
    if not signature.is_file():
        raise CertificateError(f"{record.name} is not signed")
    try:
        keys = public_key.expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise CertificateError(f"{public_key} cannot be read ({error})") from error
    if len(keys) < 2 or "PRIVATE" in " ".join(keys[:4]):
        raise CertificateError(
            f"{public_key} is not a public ssh key; it is a line like 'ssh-ed25519 AAAA...'"
        )
    with tempfile.TemporaryDirectory() as folder:
        allowed = Path(folder) / "allowed"
        allowed.write_text(f'{SIGNER} namespaces="{NAMESPACE}" {keys[0]} {keys[1]}\n', encoding="utf-8")
        done = _ssh_keygen(
            "verify", "-f", str(allowed), "-I", SIGNER, "-n", NAMESPACE, "-s", str(signature),
            text=record.read_bytes(),
        )  # fmt: skip
    if done.returncode:
        raise CertificateError(f"{record.name} differs from what the owner of {public_key} signed")
    return f"{record.name} is as the owner of {public_key} signed it"


def _ssh_keygen(
    action: str, *arguments: str, text: bytes | None = None
) -> "subprocess.CompletedProcess[bytes]":
    program = shutil.which("ssh-keygen")
    if program is None:
        raise MissingExtraError("signatures need ssh-keygen of OpenSSH 8.2 or later; install openssh-client")
    try:
        return subprocess.run(
            [program, "-Y", action, *arguments], input=text, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise CertificateError(f"ssh-keygen gave no answer in {SECONDS} s") from None


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
