"""What comes out: which models are measured, and the formats of the product."""

from typing import Literal

from pydantic import Field, model_validator

from sqft.sections.base import PathText, Positive, Section

__all__ = ["EvaluateSection", "ExportFormat", "ExportSection", "ReportedModel"]

ExportFormat = Literal["compressed-tensors", "gguf", "gptq", "openvino", "safetensors", "safetensors-float32"]
ReportedModel = Literal[
    "base", "tuned", "dense_tuned", "sparse", "quantized", "reconstructed", "adapted", "merged"
]


class EvaluateSection(Section):
    """What is measured, and on which items."""

    models: list[ReportedModel] | None = Field(
        None,
        min_length=1,
        description="Default: every model of the recipe, the tuned one merged where it can be. dense_tuned, "
        "plain LoRA on the dense model with the same budget, is trained only where named here.",
    )
    split: Literal["test", "search"] = Field(
        "test",
        description="search: measure on the search items, to choose between runs; figures on test items "
        "that a choice was made by mean nothing.",
    )
    max_items: Positive | None = Field(None, description="Use the first so many items.")
    batch_size: Positive = 16
    max_new_tokens: Positive = Field(64, description="Longest generated answer.")
    general_text: PathText | None = Field(
        "package",
        description="Loss on a text that is not of the task, so that forgetting shows: package, some 4,000 "
        "tokens that come with sqft; a text file; or null.",
    )
    perplexity: PathText | None = Field(None, description="A text file.")
    perplexity_tokens: int = Field(8192, ge=2, description="Tokens of it, in windows of sequence_length.")
    sequence_length: int = Field(512, ge=2, description="Tokens of a window; its first one is not predicted.")
    tasks: list[PathText] = Field(
        [], description="Tasks of lm-evaluation-harness, by name or YAML file (extra: eval)."
    )
    tasks_data: PathText | None = Field(
        None, description="A folder with NAME/test.jsonl of each task, in place of data sets of the hub."
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="Solved examples before each item of a task; default: the task's own number."
    )

    @model_validator(mode="after")
    def _tasks(self) -> "EvaluateSection":
        if not self.tasks and (self.tasks_data is not None or self.num_fewshot is not None):
            raise ValueError("tasks_data and num_fewshot are settings of tasks; name some in tasks")
        return self


class ExportSection(Section):
    """Formats to write the merged model in."""

    formats: list[ExportFormat] = Field([], min_length=1)
