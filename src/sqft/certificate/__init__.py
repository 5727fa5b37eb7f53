"""Showing that a merged model is the model that was trained: integrity and provenance."""

from sqft.certificate.certification import certify_model, write_certificate
from sqft.certificate.integrity import check_integrity
from sqft.certificate.provenance import check_provenance
from sqft.checks import Check, require_passed

__all__ = [
    "Check",
    "certify_model",
    "check_integrity",
    "check_provenance",
    "require_passed",
    "write_certificate",
]
