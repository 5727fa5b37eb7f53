"""Adapters that were trained elsewhere, merged rung by rung into bases of other tools."""

from sqft.foreign.base import convert_base, convert_training_base
from sqft.foreign.dense import check_dense, merge_dense
from sqft.foreign.merge import MergeObserver, MergeResult, merge_foreign

__all__ = [
    "MergeObserver",
    "MergeResult",
    "check_dense",
    "convert_base",
    "convert_training_base",
    "merge_dense",
    "merge_foreign",
]
