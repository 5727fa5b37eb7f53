"""What a stage may use while it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.pipeline.recipe import Recipe
from sqft.progress import Progress
from sqft.sections import (
    AdapterSection,
    CalibrationSection,
    DataSection,
    QuantizeSection,
    SparsifySection,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sqft.data import Splits
    from sqft.models import Checkpoint

__all__ = ["StageContext"]


@dataclass(frozen=True)
class StageContext:
    """What a stage may use: the recipe, the directories of its inputs, and its own directory to fill."""

    recipe: Recipe
    stage: str
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
    def compressing(self) -> dict[str, Any]:
        """Options of the two functions that compress a model."""
        return {"device": self.device, "progress": self.progress, "spill": self.recipe.runtime.spill}

    def checkpoint(self, name: str) -> "Checkpoint":
        """The model directory of an input, opened without its weights."""
        from sqft.models import open_checkpoint

        return open_checkpoint(self.inputs[name], trust_remote_code=self.trusts_code)

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

    def splits(self) -> "Splits":
        """The training, search and test items, tokenized."""
        from sqft.data import load_splits
        from sqft.models import load_tokenizer

        tokenizer = load_tokenizer(self.inputs["model"], trust_remote_code=self.trusts_code)
        return load_splits(self.data, tokenizer, seed=self.recipe.seed)

    def calibration(self, asking: SparsifySection | QuantizeSection) -> "Tensor | None":
        """The calibration tokens (num_samples, sequence_length), where this section looks at them."""
        if not asking.calibrates:
            return None
        from sqft.data import calibration_tokens
        from sqft.models import load_tokenizer

        section = self.recipe.calibration or CalibrationSection()
        tokenizer = load_tokenizer(self.inputs["model"], trust_remote_code=self.trusts_code)
        return calibration_tokens(section, self.recipe.data, tokenizer, seed=self.recipe.seed)
