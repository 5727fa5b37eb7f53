"""Choosing one sub-adapter of a super-adapter; the objective is passed in."""

from sqft.search.result import SearchResult, Trial
from sqft.search.search import METHODS, search_sub_adapter

__all__ = ["METHODS", "SearchResult", "Trial", "search_sub_adapter"]
