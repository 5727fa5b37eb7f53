"""Certifying a merged model: all checks, and their record beside the weights."""

from dataclasses import asdict
from pathlib import Path

from torch import nn

from sqft.adapters import codes_digest
from sqft.artifacts import CERTIFICATE, seal, write_json
from sqft.certificate.coverage import file_digests
from sqft.certificate.integrity import LOGIT_TOLERANCE, check_integrity
from sqft.certificate.provenance import check_provenance
from sqft.certificate.reference import (
    TokenIds,
    compute_logits,
    largest_difference,
    reference_items,
    write_reference,
)
from sqft.checks import Check, run_check
from sqft.errors import CertificateError
from sqft.progress import SILENT, Progress

__all__ = ["certify_model", "write_certificate"]


def certify_model(
    directory: Path,
    *,
    base_dir: Path,
    adapter_dir: Path,
    adapted: nn.Module,
    merged: nn.Module,
    token_ids: TokenIds,
    trained_digest: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> list[Check]:
    """Check a merged model in every way, and write its reference logits and certificate.

    adapted: the trained model before the merge; merged: opened from `directory`. trained_digest:
    `codes_digest` of the trained model, taken when training ended; default that of `adapted`.
    trust_remote_code: the model comes with Python code of its own, which opening it runs.

    Returns all checks, including failed ones: the caller must not keep a model that failed one.
    """
    digest = trained_digest or codes_digest(adapted)
    write_reference(directory, merged, token_ids)
    checks = [run_check("adapted equals merged", lambda: _compare(adapted, merged, token_ids))]
    lineage = {"base": file_digests(base_dir), "adapter": file_digests(adapter_dir)}
    checks += check_provenance(
        directory, base_dir, adapter_dir, trained_digest=digest, lineage=lineage, progress=progress
    )
    write_certificate(directory, checks, lineage=lineage, trained_digest=digest)
    checks += check_integrity(directory, progress, trust_remote_code=trust_remote_code)
    write_certificate(directory, checks, lineage=lineage, trained_digest=digest)
    return checks


def write_certificate(
    directory: Path,
    checks: list[Check],
    *,
    lineage: dict[str, dict[str, str]] | None = None,
    trained_digest: str | None = None,
) -> None:
    """Store the digests of every file in a model directory, the checks made, and what it was made of.

    Write it after `write_reference`, last of all the model's files.
    """
    value = {
        "files": file_digests(directory),
        "lineage": lineage or {},
        "trained_digest": trained_digest,
        "checks": [asdict(check) for check in checks],
    }
    write_json(directory / CERTIFICATE, seal(value))


def _compare(adapted: nn.Module, merged: nn.Module, token_ids: TokenIds) -> str:
    items = reference_items(merged, token_ids)
    share = largest_difference(compute_logits(merged, items), compute_logits(adapted, items))
    if not share <= LOGIT_TOLERANCE:
        raise CertificateError(f"logits differ by {share:.2e} of the largest, allowed {LOGIT_TOLERANCE:.0e}")
    return f"{len(items)} items, largest difference {share:.1e} of the largest logit"
