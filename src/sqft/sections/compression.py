"""Every setting of sqft: one class for each section of a recipe.

Nothing else configures the package. The classes hold plain values and import no torch, so the command line
and editors read them at once; the functions that do the work take the section they are named after.
Rules that concern two sections stand in `pipeline/recipe.py`.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

__all__ = [
    "AdapterSection",
    "CalibrationSection",
    "DataSection",
    "EvaluateSection",
    "ExportSection",
    "ModelSection",
    "QuantizeSection",
    "RuntimeSection",
    "SearchSection",
    "SparsifySection",
    "TrainSection",
    "parse_pattern",
]


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Read "2:4" as (2, 4): at most 2 kept weights in every 4 neighbours of a row.

    Raises: ValueError for anything else than N:M with 0 < N <= M.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", pattern)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise ValueError("write N:M with 0 < N <= M, for instance '2:4'")
    return int(match[1]), int(match[2])


def _check_pattern(value: str) -> str:
    parse_pattern(value)
    return value


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
QuantizeTarget = Literal["gguf-q4_0", "gguf-q4_1", "gguf-q8_0", "gptq", "openvino"]
# What a target fixes, and what it takes unless the recipe says otherwise. GGUF has blocks of 32.
TARGET_GRIDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gguf-q4_0": ({"bits": 4, "symmetric": True}, {"group_size": 32}),
    "gguf-q4_1": ({"bits": 4, "symmetric": False, "scale_bits": 7}, {"group_size": 32}),
    "gguf-q8_0": ({"bits": 8, "symmetric": True}, {"group_size": 32}),
    "gptq": ({}, {"group_size": 128}),
    "openvino": ({}, {}),
}
AdapterMethod = Literal["lora", "sparse_peft", "qa_sparse_peft"]
ExportFormat = Literal["compressed-tensors", "gguf", "gptq", "openvino", "safetensors", "safetensors-float32"]
ReportedModel = Literal["base", "dense_tuned", "sparse", "quantized", "adapted", "merged"]


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def without_effect(self) -> dict[str, str]:
        """Settings that the others leave without effect, each with the reason; given, they are refused."""
        return {}

    @model_validator(mode="after")
    def _refuse_ignored(self) -> Self:
        for name, reason in self.without_effect().items():
            if name in self.model_fields_set:
                raise ValueError(f"{name} would be ignored: {reason}; remove it")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_ignored(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        ignored = self.without_effect()
        return {name: value for name, value in write(self).items() if name not in ignored}


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


class CalibrationSection(Section):
    """The text that compression looks at."""

    source: str = Field(
        "train", description="'train' for the recipe's training texts, a .txt or .jsonl file, or hub:NAME."
    )
    field: str = Field("text", description="The field to read of a .jsonl or hub record.")
    num_samples: Positive = Field(64, description="Sequences.")
    sequence_length: Positive = Field(256, description="Tokens of each; texts are packed.")


class SparsifySection(Section):
    """Which weights become zero."""

    method: Literal["wanda", "magnitude", "ria", "sparsegpt"] = "wanda"
    sparsity: Fraction = Field(
        0.5, description="Fraction of zeros; with a pattern it follows from the pattern."
    )
    pattern: Pattern | None = Field(
        None, description="N:M, at most N kept of every M neighbours, for instance 2:4."
    )
    target_modules: list[str] | None = Field(
        None,
        description="Names or name ends of linears, or patterns such as layers.0.* or *_proj; default all in "
        "the blocks.",
    )
    skip_modules: list[str] = Field([], description="Names, ends or patterns of linears to leave dense.")
    budget: Literal["uniform", "arithmetic", "owl"] = Field(
        "uniform", description="How blocks share the zeros; arithmetic: more with depth; owl: by outliers."
    )
    budget_spread: float = Field(
        0.08, ge=0, le=0.5, description="How far a block may be off, where the budget is not uniform."
    )
    swaps: int = Field(0, ge=0, description="Swaps a row, at most, that refine the mask on the Gram matrix.")
    refit: int = Field(0, ge=0, description="Steps of least squares for the kept weights; 0 leaves them.")
    dense_targets: bool = Field(
        False,
        description="Aim at what the uncompressed model puts out (ours); keeps two sets of activations.",
    )
    sequential: bool = Field(
        False, description="Inside a block, later layers see the compressed earlier ones; more passes."
    )
    damping: float = Field(0.01, gt=0, le=1, description="Share of the Hessian's mean diagonal added to it.")

    @model_validator(mode="after")
    def _budget(self) -> "SparsifySection":
        if self.pattern is not None and self.budget != "uniform":
            raise ValueError("a pattern fixes the sparsity of every layer; leave budget at uniform")
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the method, its refinements or its budget look at activations."""
        refined = bool(self.swaps or self.refit or self.dense_targets)
        return refined or self.method != "magnitude" or self.budget == "owl"

    def without_effect(self) -> dict[str, str]:
        """With a pattern, the sparsity."""
        return {} if self.pattern is None else {"sparsity": f"pattern {self.pattern} fixes it"}


class QuantizeSection(Section):
    """The integer grid and how weights are rounded to it."""

    method: Literal["gptq", "gptaq", "joint", "rtn"] = Field(
        "gptq", description="gptaq aims at the uncompressed model's outputs; joint prunes in the same pass."
    )
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = Field(
        64, description="32, 64, 128, any divisor of the widths, or -1 for one group a row."
    )
    symmetric: bool = Field(True, description="transformers 5.23 opens asymmetric only with dequantize=True.")
    scale_bits: int = Field(8, ge=4, le=11, description="Significant bits of a scale; 7 makes Q4_1 exact.")
    damping: float = Field(0.01, gt=0, le=1, description="Share of the Hessian's mean diagonal added to it.")
    activation_order: bool = Field(False, description="Most important columns first; groups stay static.")
    descent: int = Field(0, ge=0, description="Sweeps of coordinate descent over the codes after GPTQ.")
    scale_fit: bool = Field(
        False, description="Before each sweep of descent, fit the scales to the codes by least squares."
    )
    scale_search: bool = Field(False, description="Try scales below the covering one, by squared error.")
    refit: int = Field(
        0, ge=0, description="Steps of least squares for the kept weights before they are rounded."
    )
    sequential: bool = Field(
        False, description="Inside a block, later layers see the compressed earlier ones; more passes."
    )
    sparsity: Fraction = Field(0.5, description="Fraction of zeros, for method joint only.")
    pattern: Pattern | None = Field(None, description="N:M, for method joint only.")
    target_modules: list[str] | None = Field(None, description="As in sparsify.")
    skip_modules: list[str] = Field([], description="Names, ends or patterns of linears to leave in 16 bits.")
    target: QuantizeTarget | None = Field(
        None, description="The format to serve in; fixes the grid such that its codes are exact there."
    )

    @model_validator(mode="before")
    @classmethod
    def _target(cls, values: Any) -> Any:
        target = values.get("target") if isinstance(values, dict) else None
        if target not in TARGET_GRIDS:
            return values
        fixed, usual = TARGET_GRIDS[target]
        wrong = [f"{k}: {v}" for k, v in fixed.items() if values.get(k, v) != v]
        if wrong:
            raise ValueError(f"target {target} needs {', '.join(wrong)}; leave it out or take another target")
        group_size = values.get("group_size", 32)
        if target.startswith("gguf") and (
            not isinstance(group_size, int) or group_size < 1 or group_size % 32
        ):
            raise ValueError(f"target {target} needs a group_size that is a multiple of 32")
        return usual | fixed | values

    @property
    def calibrates(self) -> bool:
        """Whether the method looks at activations."""
        return self.method != "rtn"

    def without_effect(self) -> dict[str, str]:
        """What only some methods look at."""
        if self.method == "joint":
            ignored = dict.fromkeys(
                ("activation_order", "descent", "refit", "scale_fit"), "joint does not do it"
            )
            return ignored if self.pattern is None else ignored | {"sparsity": "the pattern fixes it"}
        ignored = dict.fromkeys(("sparsity", "pattern"), f"{self.method} does not prune, only joint does")
        if self.method == "rtn":
            names = ("activation_order", "damping", "descent", "refit", "scale_fit", "sequential")
            ignored |= dict.fromkeys(names, "rtn looks at no activations")
            return ignored
        if self.method == "gptaq":
            ignored["refit"] = "gptaq does not do it"
        if not self.descent:
            ignored["scale_fit"] = "only the sweeps of descent use it; set descent"
        return ignored

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("write a positive number, or -1 for one group a row")
        return value


class AdapterSection(Section):
    """What is trained."""

    method: AdapterMethod = "qa_sparse_peft"
    ranks: list[Positive] = Field([16], min_length=1, description="More than one entry: elastic ranks (NLS).")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / max(ranks) at every rank.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Of the update only, never of the base.")
    dropout_kind: Literal["column", "token"] = Field(
        "column",
        description="column: columns of A, once a step; token: as published, costs a second product and "
        "memory of a weight's size in every layer.",
    )
    gradient: Literal["exact", "lowrank", "hybrid"] = Field(
        "exact", description="lowrank: mask in the forward only; hybrid: exact every hybrid_steps-th step."
    )
    hybrid_steps: Positive = Field(4, description="Every how many steps hybrid is exact.")
    kernels: Literal["torch", "triton"] = Field(
        "torch",
        description="triton: on an NVIDIA GPU (extra: triton), elsewhere torch; tested in its interpreter.",
    )
    target_modules: list[str] | None = Field(
        None, description="Name ends; default q, k, v, up, down and fused forms."
    )
    rank_groups: list[list[str]] | None = Field(
        None,
        description="Name ends that share a rank inside a block; default q, k, v together, others alone.",
    )
    base_precision: Literal["latent", "float32"] = Field(
        "latent",
        description="Base of quantization-aware training: latent codes, 1 byte a weight, or the same weights "
        "decoded to float32: faster, 4 bytes, equal results.",
    )

    @field_validator("ranks")
    @classmethod
    def _ranks(cls, value: list[int]) -> list[int]:
        return sorted(set(value), reverse=True)

    @model_validator(mode="after")
    def _gradient(self) -> "AdapterSection":
        if self.method == "lora" and self.gradient != "exact":
            raise ValueError("gradient lowrank and hybrid are for sparse_peft and qa_sparse_peft")
        if self.method == "lora" and self.kernels != "torch":
            raise ValueError("kernels triton is for sparse_peft and qa_sparse_peft")
        plain = self.gradient == "exact" and self.kernels == "torch"
        if self.method != "lora" and self.dropout and self.dropout_kind == "token" and not plain:
            raise ValueError("dropout_kind token goes with gradient exact and kernels torch only")
        return self


class TrainSection(Section):
    """How the adapters are trained, with transformers.Trainer underneath."""

    learning_rate: float = Field(3e-4, gt=0)
    batch_size: Positive = Field(8, description="Items of an optimizer step on one device.")
    gradient_accumulation: Positive = Field(1, description="Micro-batches that batch_size is cut into.")
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="Overrides epochs.")
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    gradient_checkpointing: bool = False
    checkpoint_steps: Positive = Field(50, description="Optimizer steps between checkpoints to resume from.")
    arguments: dict[str, Any] = Field({}, description="Any further field of transformers.TrainingArguments.")


class SearchSection(Section):
    """Which sub-adapter of the super-adapter is taken."""

    method: Literal["median", "maximal", "minimal", "hill_climb"] = "median"
    num_trials: Positive = Field(
        20, description="Sub-adapters that hill_climb evaluates, the median included."
    )
    neighbours: Positive = Field(2, description="Rank groups that a step of hill_climb moves.")


class EvaluateSection(Section):
    """What is measured, on the test items."""

    models: list[ReportedModel] | None = Field(
        None,
        min_length=1,
        description="Default: every model of the recipe, the tuned one merged where it can be. dense_tuned, "
        "plain LoRA on the dense model with the same budget, is trained only where named here.",
    )
    max_items: Positive | None = Field(None, description="Use the first so many test items.")
    batch_size: Positive = 16
    max_new_tokens: Positive = Field(64, description="Longest generated answer.")
    perplexity: str | None = Field(None, description="A text file.")
    perplexity_tokens: Positive = Field(8192, description="Tokens of it, in windows of sequence_length.")
    sequence_length: Positive = 512
    tasks: list[str] = Field(
        [], description="Tasks of lm-evaluation-harness, by name or YAML file (extra: eval)."
    )


class ExportSection(Section):
    """Formats to write the merged model in."""

    formats: list[ExportFormat] = Field([], min_length=1)


class RuntimeSection(Section):
    """What must not change a result; never part of a stage's identity."""

    workspace: str = "runs"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    threads: Positive | None = None
    log_level: Literal["debug", "info", "warning"] = "warning"
    spill: bool = Field(
        False, description="While compressing, keep the calibration's activations in files, not in memory."
    )

    @model_validator(mode="after")
    def _device(self) -> "RuntimeSection":
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise ValueError("device is auto, cpu, cuda or cuda:N")
        return self
