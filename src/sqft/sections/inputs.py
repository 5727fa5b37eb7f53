"""What a recipe starts from: the model, the items, the calibration texts."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sqft.sections.base import Fraction, PathText, Positive, Section

__all__ = ["CalibrationSection", "DataForm", "DataSection", "DataSource", "HubSource", "ModelSection"]

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


class HubSource(Section):
    """A data set of the Hugging Face hub (extra: hub). A text hub:NAME[:CONFIG[:SPLIT]] stands for it."""

    hub: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$", description="Name, as openai/gsm8k.")
    config: str | None = Field(
        None, pattern=r"^[\w.-]+$", description="Configuration, where the data set has several."
    )
    split: str = Field("train", description="Split, or a part of one: train[:1000].")
    revision: str | None = Field(None, description="Branch, tag or commit.")
    records: Positive | None = Field(
        None, description="Use the first so many, and fetch no more than they need."
    )


def _read_source(value: Any) -> Any:
    if value == []:
        raise ValueError("the list is empty; name a file")
    if isinstance(value, str) and value.startswith("hub:"):
        parts = value.removeprefix("hub:").split(":", 2)
        return dict(zip(("hub", "config", "split"), parts, strict=False))
    return value


DataSource = Annotated[PathText | list[PathText] | HubSource, BeforeValidator(_read_source)]
DataForm = Literal[
    "auto", "template", "messages", "prompt-completion", "question-answer", "alpaca", "choices", "text"
]


class DataSection(Section):
    """Training, search and test items, from files or the hub."""

    train: DataSource = Field(
        description="A file (.jsonl, .json, .csv, .tsv, .parquet, .txt; also .gz), a pattern such as "
        "data/*.csv, a list of them, or hub:NAME[:CONFIG[:SPLIT]]."
    )
    search: DataSource | None = Field(
        None, description="Items that the search may look at; else split off train."
    )
    test: DataSource | None = Field(None, description="Items for evaluation only; else split off train.")
    form: DataForm = Field(
        "auto", description="What a record holds; auto: told by its fields. sqft preview shows what was read."
    )
    prompt: str | None = Field(
        None, description="Format string over the record's fields; for records of no form that is known."
    )
    answer: str | None = Field(None, description="Format string over the record's fields.")
    choices: str | None = Field(
        None, description="Field with a list of choices: multiple choice by likelihood."
    )
    label: str | None = Field(
        None, description="Field with the right choice: its index, its letter or its name; default label."
    )
    template: Literal["plain", "chat"] | None = Field(
        None,
        description="plain: prompt, then answer; chat: the model's own chat template. Default: chat for "
        "messages, and for alpaca where the model has a template; else plain.",
    )
    loss_on: Literal["answer", "text"] = Field(
        "answer",
        description="Tokens the loss counts, of a conversation every turn of the assistant; the paper: text.",
    )
    sequence_length: Positive = Field(
        512,
        description="Longer items are refused or dropped, never cut; texts without an answer are cut into "
        "windows of this length.",
    )
    too_long: Literal["drop", "error"] = "drop"
    search_items: Positive | None = Field(
        None,
        description="Items split off train for the search, where search is unset; default 64, of small data "
        "a tenth.",
    )
    test_items: Positive | None = Field(
        None,
        description="Items split off train for the test, where test is unset; default 300, of small data a "
        "fifth.",
    )
    train_items: Positive | None = Field(None, description="Use this many training items at most.")

    def rendering(self) -> dict[str, Any]:
        """The settings that turn a record into a prompt and an answer, without the files and their splits."""
        return self.model_dump(mode="json", exclude=NOT_RENDERING, exclude_none=True)

    @property
    def uses_template(self) -> bool:
        """Whether the recipe says itself what prompt and answer are."""
        return self.form == "template" or any((self.prompt, self.answer, self.choices))

    @model_validator(mode="after")
    def _form(self) -> "DataSection":
        if self.form not in ("auto", "template", "choices") and self.uses_template:
            raise ValueError(f"form {self.form} fixes prompt and answer; leave one of them out")
        if self.form == "template" and not (self.prompt and self.answer):
            raise ValueError("form template needs prompt and answer")
        if self.template == "plain" and self.form == "messages":
            raise ValueError("messages are rendered by the chat template; leave template out")
        if self.form == "text" and self.template:
            raise ValueError("texts have no template; leave it out")
        return self


class CalibrationSection(Section):
    """The text that compression looks at."""

    source: DataSource = Field(
        "train",
        description="'train' for the recipe's training texts, or other texts: files or hub:NAME, as in data.",
    )
    mix: DataSource | None = Field(
        None,
        description="Texts of another kind beside it, so that compression does not fit the task alone.",
    )
    mix_share: Fraction = Field(0.5, description="Share of the sequences that are from mix.")
    field: str = Field("text", description="The field of a record that holds the text.")
    num_samples: Positive = Field(64, description="Sequences.")
    sequence_length: Positive = Field(256, description="Tokens of each; texts are packed.")

    @property
    def sources(self) -> list[tuple[str, DataSource, int]]:
        """(setting, source, sequences) of each kind of text."""
        mixed = 0 if self.mix is None else round(self.mix_share * self.num_samples)
        parts = [("source", self.source, self.num_samples - mixed)]
        return parts + ([("mix", self.mix, mixed)] if self.mix is not None else [])

    def without_effect(self) -> dict[str, str]:
        """A share of nothing."""
        return {"mix_share": "there is no calibration.mix"} if self.mix is None else {}

    @model_validator(mode="after")
    def _mix(self) -> "CalibrationSection":
        if self.mix == "train":
            raise ValueError("mix is for texts other than the training items; for those, write source: train")
        return self
