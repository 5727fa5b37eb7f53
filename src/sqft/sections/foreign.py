"""How an adapter that was trained elsewhere is merged; no section of a recipe, `sqft merge` takes these."""

from typing import Literal

from pydantic import Field

from sqft.sections.base import Positive, Section

__all__ = ["MergeRung", "MergeSection"]

MergeRung = Literal["round", "feedback", "rescale", "polish"]


class MergeSection(Section):
    """How far a merge climbs, and what it takes the base for."""

    rungs: list[MergeRung] = Field(
        ["round", "feedback", "rescale", "polish"], min_length=1, description="Rungs to climb, in order."
    )
    enough: float = Field(0.95, description="Stop at the first rung that retains this share of the gain.")
    least: float = Field(
        0.5, description="Refuse below this share of the gain, or of the update where nothing is measured."
    )
    trained_on: str | None = Field(
        None, description="The base that the adapter was trained on, if another one: DIR or nf4:DIR."
    )
    dequantize: bool = Field(False, description="Take a GPTQ, AWQ or NF4 base as 16-bit weights.")
    polish_steps: Positive = Field(60, description="Optimizer steps of the polish.")
    seed: int = Field(0, ge=0, description="Of the polish's batches.")
