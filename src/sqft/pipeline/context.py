"""What a stage may use while it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqft.pipeline.recipe import Recipe
from sqft.progress import Progress
from sqft.sections import AdapterSection, DataSection

__all__ = ["ADAPTER", "ITEM_FIGURES", "StageContext"]

ADAPTER = "adapter"  # where train and search keep theirs
ITEM_FIGURES = "items.json"  # of every item of an evaluation


@dataclass(frozen=True)
class StageContext:
    """What a stage may use: the recipe, the directories of its inputs, and its own directory to fill.

    argument: of the stages that a recipe has several of, which one. final: the name that the directory gets.
    """

    recipe: Recipe
    argument: str
    final: Path
    inputs: Mapping[str, Path]
    device: str
    progress: Progress
    directory: Path = Path()

    def working_in(self, directory: Path) -> "StageContext":
        """The same context, with the unfinished directory to fill."""
        return replace(self, directory=directory)

    @property
    def trusts_code(self) -> bool:
        """Whether the recipe lets the model run Python code of its own."""
        return self.recipe.model.trust_remote_code

    @property
    def loading(self) -> dict[str, Any]:
        """Options of every function that loads a model."""
        return {"device": self.device, "trust_remote_code": self.trusts_code}

    @property
    def opening(self) -> dict[str, Any]:
        """Options of the functions that open a model with its adapter."""
        precision = self.recipe.adapters.base_precision if self.recipe.adapters else "latent"
        return self.loading | {"base_precision": precision}

    @property
    def compressing(self) -> dict[str, Any]:
        """Options of the two functions that compress a model."""
        return {"device": self.device, "progress": self.progress, "spill": self.recipe.runtime.spill}

    @property
    def base(self) -> Path:
        """The model directory that the adapters stand on."""
        return self.inputs[self.recipe.base_stage]

    @property
    def adapters(self) -> AdapterSection:
        """The adapters section of a recipe that has a train stage."""
        assert self.recipe.adapters is not None
        return self.recipe.adapters

    @property
    def data(self) -> DataSection:
        """The data section of a recipe that has items."""
        assert self.recipe.data is not None
        return self.recipe.data
