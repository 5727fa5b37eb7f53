"""A teacher whose predictions are learnt beside the answers."""

from pydantic import Field, model_validator

from sqft.sections.base import PathText, Positive, Section
from sqft.sections.inputs import DataSource

__all__ = ["DistillationSection"]


class DistillationSection(Section):
    """What `train` learns from a teacher beside the answers, so that less of everything else is forgotten."""

    teacher: PathText = Field(
        "dense",
        description="dense: the recipe's model as it came; tuned: what tune made of it; or another model "
        "with the same tokenizer: a folder, GGUF file or hub id.",
    )
    text: DataSource | None = Field(
        None, description="Texts that are not of the task, to be predicted as the teacher does: as in data."
    )
    text_weight: float = Field(1.0, gt=0, description="Of the texts' loss; that of the answers counts 1.")
    item_weight: float = Field(
        0.0, ge=0, description="Of the same loss on the items' counted tokens; 0: the teacher sees no item."
    )
    field: str = Field("text", description="The field of a record that holds the text.")
    num_samples: Positive = Field(512, description="Sequences of text.")
    sequence_length: Positive = Field(64, description="Tokens of each; texts are packed.")
    batch_size: Positive = Field(4, description="Sequences of text in each optimizer step, on one device.")
    top_k: Positive = Field(
        64, description="Most likely tokens of which a probability is kept; the others share one."
    )

    @property
    def is_named(self) -> bool:
        """Whether the teacher is a model that the recipe does not make."""
        return self.teacher not in ("dense", "tuned")

    def without_effect(self) -> dict[str, str]:
        """Settings of texts where there are none."""
        if self.text is not None:
            return {}
        names = ("text_weight", "field", "num_samples", "sequence_length", "batch_size")
        return dict.fromkeys(names, "there is no distillation.text")

    @model_validator(mode="after")
    def _something(self) -> "DistillationSection":
        if self.text is None and not self.item_weight:
            raise ValueError("nothing would be learnt from the teacher; give text, or an item_weight above 0")
        if self.text == "train":
            raise ValueError(
                "text is for texts other than the training items; for the items, set item_weight"
            )
        if self.text is not None and self.sequence_length < 2:
            raise ValueError("sequence_length must be 2 at least: the first token is not predicted")
        return self
