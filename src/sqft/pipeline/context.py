"""What a stage may use while it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from sqft.artifacts import FACTS, write_json
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.team import Team
from sqft.progress import Progress
from sqft.sections import AdapterSection, DataSection

__all__ = ["ADAPTER", "TRAINING", "StageContext", "write_adapter_facts"]

ADAPTER = "adapter"  # where train and search keep theirs
TRAINING = "training"  # where tune keeps what it merged, and how that was trained
CHAIN = (
    "model", "tuned", "tune", "sparsify", "quantize", "reconstruct", "teacher_model", "teacher", "trained",
    "train", "search",
)  # fmt: skip


class CompressionOptions(TypedDict):
    """How the functions that compress a model do their work, whatever they make of it."""

    device: str
    progress: Progress
    spill: bool


@dataclass(frozen=True)
class StageContext:
    """What a stage may use: the recipe, the directories of its inputs, and its own directory to fill.

    argument: of the stages that a recipe has several of, which one. final: the name that the directory gets.
    keys: the identity of every stage and input. team: the processes that train together, where several do.
    """

    recipe: Recipe
    argument: str
    final: Path
    inputs: Mapping[str, Path]
    device: str
    progress: Progress
    directory: Path = Path()
    keys: Mapping[str, str] = field(default_factory=dict)
    team: Team | None = None

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
    def compressing(self) -> "CompressionOptions":
        """Options of the functions that compress a model."""
        return {"device": self.device, "progress": self.progress, "spill": self.recipe.runtime.spill}

    @property
    def dense(self) -> Path:
        """The model directory that is compressed."""
        return self.inputs[self.recipe.dense_stage]

    @property
    def base(self) -> Path:
        """The model directory that the adapters stand on."""
        return self.inputs[self.recipe.base_stage]

    def lineage(self, last: str) -> dict[str, str]:
        """The identities of what a model is made by, from the recipe's model to the last stage of them."""
        chain = CHAIN[: CHAIN.index(last) + 1]
        return {name: self.keys[name] for name in chain if self.keys.get(name)}

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


def write_adapter_facts(context: StageContext) -> None:
    """Say beside an adapter how the prompts were made that it was trained with."""
    write_json(context.directory / ADAPTER / FACTS, {"kind": "adapter", "prompt": context.data.rendering()})
