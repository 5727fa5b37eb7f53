"""Choosing one sub-adapter of a super-adapter; the objective is passed in."""

from sqft.search.result import SearchResult, Trial
from sqft.search.search import METHODS, search_sub_adapter
from sqft.search.surrogate import rank_slopes

__all__ = ["METHODS", "SearchResult", "Trial", "rank_slopes", "search_sub_adapter"]
