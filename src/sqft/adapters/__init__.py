"""Adapters as a PEFT method: configuration, layer, elastic ranks, sub-adapters, merging.

Importing this package enters the method "SQFT" into PEFT's tables.
"""

from sqft.adapters.attach import attach_adapters
from sqft.adapters.config import SqftConfig
from sqft.adapters.extraction import extract_sub_adapter
from sqft.adapters.identity import base_identity
from sqft.adapters.layer import MergedWeight
from sqft.adapters.merge import codes_digest, count_differing_codes, merge_adapters, merge_norms
from sqft.adapters.space import SearchSpace, SubAdapter, set_ranks, set_step
from sqft.adapters.tuner import register_peft_method

__all__ = [
    "MergedWeight",
    "SearchSpace",
    "SqftConfig",
    "SubAdapter",
    "attach_adapters",
    "base_identity",
    "codes_digest",
    "count_differing_codes",
    "extract_sub_adapter",
    "merge_adapters",
    "merge_norms",
    "set_ranks",
    "set_step",
]

register_peft_method()
