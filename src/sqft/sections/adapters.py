"""What is trained, before compression and after it, how, and which of the trained sub-adapters is taken."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sqft.sections.base import ModuleNames, NonNegative, PathText, Positive, Section

__all__ = [
    "AdapterMethod",
    "AdapterSection",
    "SearchSection",
    "TrainSection",
    "TrainingSection",
    "TuneSection",
]

AdapterMethod = Literal["lora", "sparse_peft", "qa_sparse_peft", "scales"]


class AdapterSection(Section):
    """What is trained."""

    method: AdapterMethod = Field(
        "qa_sparse_peft",
        description="scales: the group scales of a quantized base and the norms, no low-rank update.",
    )
    train_scales: bool | None = Field(
        None,
        description="Train the group scales of every quantized linear; with qa_sparse_peft beside the "
        "low-rank update. Default: where method is scales.",
    )
    train_norms: bool | None = Field(
        None,
        description="Train the weights of the norms too; goes with every method that merges. Default: where "
        "method is scales.",
    )
    ranks: list[NonNegative] = Field(
        [16],
        min_length=1,
        description="More than one entry: elastic ranks (NLS); with 0, a rank group may be left out.",
    )
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
    kernels: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="auto: what was measured to be faster on the card, torch on a CPU (docs/gpu.md); triton: "
        "on an NVIDIA GPU (extra: triton), elsewhere torch.",
    )
    target_modules: ModuleNames | None = Field(
        None,
        description="As in sparsify; default q, k, v, up, down and fused forms; with method scales every "
        "quantized linear.",
    )
    skip_modules: ModuleNames = Field([], description="Linears to leave out, named as in sparsify.")
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
        if not any(value):
            raise ValueError("rank 0 alone trains nothing; add one above 0")
        return sorted(set(value), reverse=True)

    @property
    def low_rank(self) -> bool:
        """Whether there is a low-rank update, with ranks to search."""
        return self.method != "scales"

    @property
    def loaded_as(self) -> Literal["latent", "float32", "packed"]:
        """The form in which a quantized base is held: codes alone, where nothing else is looked at."""
        return self.base_precision if self.low_rank else "packed"

    @property
    def trains_scales(self) -> bool:
        """Whether group scales are trained."""
        return self.method == "scales" if self.train_scales is None else self.train_scales

    @property
    def trains_norms(self) -> bool:
        """Whether the weights of norms are trained."""
        return self.method == "scales" if self.train_norms is None else self.train_norms

    def without_effect(self) -> dict[str, str]:
        """Method scales has no low-rank update, whose gradient and ranks could be set."""
        if self.low_rank:
            return {}
        names = ("gradient", "hybrid_steps", "kernels", "rank_groups", "base_precision")
        return dict.fromkeys(names, "method scales has no low-rank update")

    @model_validator(mode="after")
    def _trained(self) -> "AdapterSection":
        if self.trains_scales and self.method in ("lora", "sparse_peft"):
            raise ValueError(
                f"train_scales: {self.method} has no scales; use method scales or qa_sparse_peft"
            )
        if self.trains_norms and self.method == "lora":
            raise ValueError(
                "train_norms goes with the methods that merge: sparse_peft, qa_sparse_peft, scales"
            )
        if self.method == "scales" and not self.trains_scales:
            raise ValueError("train_scales: method scales always trains the scales; remove it")
        beside = self.trains_scales and self.low_rank
        if beside and (self.gradient != "exact" or self.kernels == "triton"):
            raise ValueError("train_scales goes with gradient exact, and kernels auto or torch")
        if beside and self.dropout and self.dropout_kind == "token":
            raise ValueError("train_scales goes with dropout_kind column")
        if beside and self.base_precision == "float32":
            raise ValueError("train_scales goes with base_precision latent")
        return self

    @model_validator(mode="after")
    def _gradient(self) -> "AdapterSection":
        if self.method == "lora" and self.gradient != "exact":
            raise ValueError("the gradient of lora is exact; lowrank and hybrid are for masked updates")
        if self.method == "lora" and self.kernels == "triton":
            raise ValueError("kernels triton is for sparse_peft and qa_sparse_peft; leave it at auto")
        plain = self.gradient == "exact" and self.kernels != "triton"
        if self.method != "lora" and self.dropout and self.dropout_kind == "token" and not plain:
            raise ValueError("dropout_kind token goes with gradient exact and kernels auto or torch only")
        return self


class TrainingSection(Section):
    """What every training has, with transformers.Trainer underneath."""

    place: ClassVar[str]  # what messages call the section

    learning_rate: float = Field(3e-4, gt=0, description="Of low-rank updates.")
    batch_size: Positive = Field(8, description="Items of an optimizer step on one device.")
    gradient_accumulation: Positive = Field(1, description="Micro-batches that batch_size is cut into.")
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="Overrides epochs.")
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    gradient_checkpointing: bool = False
    packing: Literal["bfd"] | None = Field(
        None,
        description="bfd: items of a batch share rows (best fit decreasing) in place of being padded; the "
        "loss is the same, and items of unequal length train faster.",
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=2**32 - 1,
        description="Of the adapters' start, the order of items and the drawn ranks, where it is not the "
        "recipe's: runs that differ in it share splits and compression.",
    )
    eval_steps: int = Field(
        50,
        ge=0,
        description="Optimizer steps between measurements of the loss on the search items, at the median "
        "ranks; also after the last one. 0: never.",
    )
    early_stopping: Positive | None = Field(
        None, description="End after so many measurements in a row without a lower loss on the search items."
    )
    keep: Literal["last", "best"] | None = Field(
        None,
        description="best: the measured step with the lowest loss on the search items. Default: best with "
        "early_stopping, else last.",
    )
    checkpoint_steps: Positive = Field(50, description="Optimizer steps between checkpoints to resume from.")
    arguments: dict[str, Any] = Field({}, description="Any further field of transformers.TrainingArguments.")

    @property
    def keeps_best(self) -> bool:
        """Whether the best measured step is kept, and not the last one."""
        return self.keep == "best" or (self.keep is None and self.early_stopping is not None)

    @property
    def selects(self) -> bool:
        """Whether what is measured while training decides what comes out of it."""
        return self.keeps_best or self.early_stopping is not None

    @model_validator(mode="after")
    def _measured(self) -> "TrainingSection":
        if self.selects and not self.eval_steps:
            name = "early_stopping" if self.early_stopping else "keep: best"
            raise ValueError(
                f"{name} goes by what is measured every eval_steps steps; set eval_steps above 0"
            )
        return self


class TrainSection(TrainingSection):
    """How the adapters are trained, with transformers.Trainer underneath."""

    place: ClassVar[str] = "train"

    scale_learning_rate: float = Field(
        6e-3, gt=0, description="Of trained scales: the share of a scale that a step of Adam moves it by."
    )
    norm_learning_rate: float = Field(2e-3, gt=0, description="Of trained norms.")
    adapter: PathText | None = Field(
        None,
        description="A folder with an adapter that exists already, of the same base and the same `adapters`: "
        "the training goes on from it. One of sqft's, or for method lora a LoRA in PEFT's files.",
    )


class TuneSection(TrainingSection):
    """Plain LoRA on the dense model, merged into it before anything is compressed; trained as by `train`."""

    place: ClassVar[str] = "tune"

    rank: Positive = Field(16, description="Of the low-rank updates.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Of the update only, never of the model.")
    target_modules: ModuleNames | None = Field(
        None, description="As in sparsify; default q, k, v, up, down and fused forms."
    )
    skip_modules: ModuleNames = Field([], description="Linears to leave out, named as in sparsify.")
    adapter: PathText | None = Field(
        None, description="A folder with a LoRA that exists already, in PEFT's files; nothing is trained."
    )
    model: PathText | None = Field(
        None,
        description="A tuned model that exists already: a folder, GGUF file or hub id; nothing is trained.",
    )

    @property
    def trains(self) -> bool:
        """Whether anything is trained, or the result of a training is taken as it is."""
        return self.adapter is None and self.model is None

    @property
    def adapters(self) -> AdapterSection:
        """The adapter that is trained."""
        return AdapterSection(
            method="lora",
            ranks=[self.rank],
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            skip_modules=self.skip_modules,
        )

    def without_effect(self) -> dict[str, str]:
        """A tuned model that exists already is not trained."""
        if self.trains:
            return {}
        given = "adapter" if self.adapter is not None else "model"
        ignored = set(type(self).model_fields) - {"adapter", "model"}
        return dict.fromkeys(sorted(ignored), f"tune.{given} is trained already")

    @model_validator(mode="after")
    def _one_origin(self) -> "TuneSection":
        if self.adapter is not None and self.model is not None:
            raise ValueError("adapter and model are two tuned models; leave one of them out")
        return self


class SearchSection(Section):
    """Which sub-adapter of the super-adapter is taken."""

    method: Literal["median", "maximal", "minimal", "hill_climb", "surrogate"] = Field(
        "median",
        description="surrogate: those that look best by gradients at the smallest and the largest, and the "
        "median, are evaluated.",
    )
    num_trials: Positive = Field(
        20, description="Sub-adapters that hill_climb or surrogate evaluates, the median included."
    )
    budget: float | None = Field(None, gt=0, description="Of surrogate: the mean rank over groups at most.")
    neighbours: Positive = Field(2, description="Rank groups that a step of hill_climb moves.")

    @property
    def evaluates(self) -> bool:
        """Whether sub-adapters are compared on the search items."""
        return self.method in ("hill_climb", "surrogate")

    def without_effect(self) -> dict[str, str]:
        """Only the surrogate knows of every sub-adapter what it would lose."""
        return {} if self.method == "surrogate" else {"budget": "it goes with method surrogate"}
