"""What a recipe starts from: the model, the items, the calibration texts."""

from typing import Any, Literal

from pydantic import Field

from sqft.sections.base import Positive, Section

__all__ = ["CalibrationSection", "DataSection", "ModelSection"]

# Settings of a data section that say which items there are, and not how one is rendered.
NOT_RENDERING = {
    "train", "search", "test", "search_items", "test_items", "train_items", "loss_on", "too_long"
}  # fmt: skip


class ModelSection(Section):
    """Which model to start from. In a recipe, a plain string stands for `source`."""

    source: str = Field(description="A directory with safetensors, a GGUF file, or a hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    storage_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="How weights are kept on disk. auto: the model's own; bfloat16 for a GGUF file."
    )


class DataSection(Section):
    """Training, search and test items, from JSON lines."""

    train: str = Field(description="A .jsonl file, one record a line.")
    search: str | None = Field(None, description="Items that the search may look at; else split off train.")
    test: str | None = Field(None, description="Items for evaluation only; else split off train.")
    prompt: str = Field("{question}", description="Format string over the record's fields.")
    answer: str = Field("{answer}", description="Format string over the record's fields.")
    choices: str | None = Field(
        None, description="Field with a list of choices: multiple choice by likelihood."
    )
    label: str = Field("label", description="Field with the index of the right choice, where choices is set.")
    template: Literal["plain", "chat"] = Field(
        "plain", description="plain: prompt, then answer; chat: the model's own chat template."
    )
    loss_on: Literal["answer", "text"] = Field(
        "answer", description="Tokens the loss counts; the paper: text."
    )
    sequence_length: Positive = Field(512, description="Longer items are refused or dropped, never cut.")
    too_long: Literal["drop", "error"] = "drop"
    search_items: Positive = Field(
        64, description="Items split off train for the search, where search is unset."
    )
    test_items: Positive = Field(300, description="Items split off train for the test, where test is unset.")
    train_items: Positive | None = Field(None, description="Use this many training items at most.")

    def rendering(self) -> dict[str, Any]:
        """The settings that turn a record into a prompt and an answer, without the files and their splits."""
        return self.model_dump(mode="json", exclude=NOT_RENDERING, exclude_none=True)


class CalibrationSection(Section):
    """The text that compression looks at."""

    source: str = Field(
        "train", description="'train' for the recipe's training texts, a .txt or .jsonl file, or hub:NAME."
    )
    field: str = Field("text", description="The field to read of a .jsonl or hub record.")
    num_samples: Positive = Field(64, description="Sequences.")
    sequence_length: Positive = Field(256, description="Tokens of each; texts are packed.")
