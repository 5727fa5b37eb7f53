"""A recipe: at most one section for each step, checked as a whole before anything runs."""

from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, field_validator, model_validator

from sqft.sections import (
    AdapterSection,
    CalibrationSection,
    DataSection,
    DistillationSection,
    EvaluateSection,
    ExportSection,
    ModelSection,
    QuantizeSection,
    ReconstructSection,
    ReportedModel,
    RuntimeSection,
    SearchSection,
    Section,
    SparsifySection,
    TrainSection,
    TuneSection,
)

__all__ = ["LOW_RANK", "Recipe"]

# Settings of adapters that concern the low-rank update alone.
LOW_RANK = ("ranks", "alpha", "dropout", "dropout_kind")


class Recipe(Section):
    """tune → sparsify → quantize → reconstruct → train → search → merge → evaluate → export.

    Only `model` is required.
    """

    name: str = Field(
        "recipe",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$",
        description="Folder of the results inside the workspace, whose own are stages and models. One slash "
        "is allowed: SWEEP/CELL.",
    )
    model: ModelSection
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Of the splits, the order of items and the drawn ranks."
    )
    data: DataSection | None = None
    calibration: CalibrationSection | None = None
    tune: TuneSection | None = None
    sparsify: SparsifySection | None = None
    quantize: QuantizeSection | None = None
    reconstruct: ReconstructSection | None = None
    adapters: AdapterSection | None = None
    distillation: DistillationSection | None = None
    train: TrainSection | None = None
    search: SearchSection | None = None
    evaluate: EvaluateSection | None = None
    export: ExportSection | None = None
    runtime: RuntimeSection = RuntimeSection()
    _path: Path | None = PrivateAttr(None)

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        problems = [message for wrong, message in self._rules() if wrong]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        """Rules that concern more than one section, each with whether it is broken."""
        method = self.adapters.method if self.adapters else None
        evaluate = self.evaluate or EvaluateSection()
        calibration = self.calibration or CalibrationSection()
        measured = [text for text in (evaluate.general_text, evaluate.perplexity) if text]
        models = self.existing_models()
        ignored = self._ignored_low_rank()
        unknown = [name for name in evaluate.models or [] if name not in [*models, "dense_tuned"]]
        return [
            (
                self.name.split("/")[0] in ("stages", "models"),
                f"name: '{self.name}' is a folder of the workspace's own",
            ),
            (bool(self.adapters and not self.data), "adapters: needs a data section"),
            (bool(self.tune and self.tune.trains and not self.data), "tune: needs a data section"),
            (bool(self.train and not self.adapters), "train: needs an adapters section, or goes"),
            (
                bool(self.distillation and not self.adapters),
                "distillation: needs an adapters section, or goes",
            ),
            (
                bool(self.distillation and self.distillation.teacher == "tuned" and not self.tune),
                "distillation.teacher: tuned needs a tune section",
            ),
            (
                bool(self.distillation and self.distillation.text in measured),
                "distillation.text: evaluate measures on the same text what is forgotten; learn another one",
            ),
            (
                bool(
                    self.distillation and self.distillation.item_weight and self.train and self.train.packing
                ),
                "distillation.item_weight: a teacher predicts items in their order; remove train.packing",
            ),
            (bool(self.search and not self.adapters), "search: needs an adapters section, or goes"),
            (
                bool(self.evaluate and not (self.data or evaluate.perplexity or evaluate.tasks)),
                "evaluate: needs a data section, evaluate.perplexity or evaluate.tasks",
            ),
            (
                method == "scales" and bool(self.search),
                "search: method scales has no ranks to choose from; remove the search section",
            ),
            (
                bool(ignored),
                f"{' and '.join(ignored)} would be ignored: method scales has no low-rank update, and "
                "dense_tuned, the reference that has one, is not among evaluate.models; remove it",
            ),
            (
                method == "sparse_peft" and bool(self.quantize),
                "adapters.method: sparse_peft merges into 16 bits; remove the quantize section or use "
                "qa_sparse_peft",
            ),
            (
                bool(self.sparsify and self.quantize and self.quantize.method == "joint"),
                "quantize.method: joint prunes by itself; remove the sparsify section",
            ),
            (
                bool(self.reconstruct and not (self.sparsify or self.quantize)),
                "reconstruct: needs a sparsify or quantize section, whose model it fits to the dense one",
            ),
            (
                bool(self.reconstruct and self.sparsify and not self.quantize)
                and bool(self.reconstruct and (self.reconstruct.train_scales or not self._fits_without_grid)),
                "reconstruct.train_scales: needs a quantize section; fit weights or norms",
            ),
            (
                bool(self.reconstruct) and calibration.num_samples < ReconstructSection.least_sequences,
                "reconstruct: holds calibration sequences out to measure on; set calibration.num_samples to "
                f"{ReconstructSection.least_sequences} or more",
            ),
            (
                self.needs_calibration and not self.data and calibration.source == "train",
                "calibration.source: 'train' needs a data section; name a text file instead",
            ),
            (
                bool(unknown),
                f"evaluate.models: this recipe makes no {', '.join(unknown)}; it makes {', '.join(models)}",
            ),
            (
                "dense_tuned" in (evaluate.models or []) and not self.adapters,
                "evaluate.models: dense_tuned needs an adapters section",
            ),
            (
                "dense_tuned" in (evaluate.models or []) and self.starting_adapter is not None,
                "evaluate.models: dense_tuned would be trained from the start, and the adapters go on from "
                "train.adapter; remove one of the two",
            ),
            (
                bool(self.search and self.search.evaluates and self.adapters)
                and len(self.adapters.ranks if self.adapters else []) < 2,
                f"search.method: {self.search and self.search.method} has one rank to choose from; give "
                "adapters.ranks more",
            ),
            (
                bool(self.search and self.search.method == "minimal" and self.adapters)
                and 0 in (self.adapters.ranks if self.adapters else []),
                "search.method: minimal would choose rank 0 everywhere, which adapts nothing; take another",
            ),
            (
                bool(self.export) and self.final_stage == "model",
                "export: needs a section that makes a model: tune, sparsify, quantize or mergeable adapters",
            ),
        ]

    def _ignored_low_rank(self) -> list[str]:
        """Settings of a low-rank update where there is none: method scales without the dense reference."""
        reference = "dense_tuned" in ((self.evaluate and self.evaluate.models) or [])
        if self.adapters is None or self.adapters.low_rank or reference:
            return []
        given = [f"adapters.{n}" for n in LOW_RANK if n in self.adapters.model_fields_set]
        rate = self.train is not None and "learning_rate" in self.train.model_fields_set
        return given + ["train.learning_rate"] * rate

    @property
    def path(self) -> Path | None:
        """The file that the recipe came from, if it came from one."""
        return self._path

    @property
    def training_seed(self) -> int:
        """The seed of the adapters' training alone."""
        return self.seed if self.train is None or self.train.seed is None else self.train.seed

    @property
    def tuning_seed(self) -> int:
        """The seed of the dense model's training alone."""
        return self.seed if self.tune is None or self.tune.seed is None else self.tune.seed

    @property
    def starting_adapter(self) -> Path | None:
        """The adapter that the training goes on from."""
        return Path(self.train.adapter) if self.train and self.train.adapter else None

    @property
    def tuned_model(self) -> ModelSection | None:
        """A tuned model that exists already."""
        if self.tune is None or self.tune.model is None:
            return None
        return self.model.model_copy(update={"source": self.tune.model, "revision": None})

    @property
    def teacher_model(self) -> ModelSection | None:
        """A teacher that the recipe does not make."""
        if self.distillation is None or not self.distillation.is_named:
            return None
        return self.model.model_copy(update={"source": self.distillation.teacher, "revision": None})

    @property
    def teacher_stage(self) -> str:
        """The input that holds the model whose predictions are learnt."""
        teacher = self.distillation.teacher if self.distillation else "dense"
        return {"dense": "model", "tuned": "tune"}.get(teacher, "teacher_model")

    @property
    def needs_calibration(self) -> bool:
        """Whether any method of the recipe looks at activations."""
        sections = (self.sparsify, self.quantize, self.reconstruct)
        return any(section is not None and section.calibrates for section in sections)

    @property
    def _fits_without_grid(self) -> bool:
        """Whether reconstruct fits anything but scales."""
        return self.reconstruct is not None and bool(set(self.reconstruct.rates) - {"scales"})

    @property
    def pattern(self) -> str | None:
        """The N:M pattern of the zeros, wherever they are made."""
        if self.quantize and self.quantize.method == "joint":
            return self.quantize.pattern
        return self.sparsify.pattern if self.sparsify else None

    @property
    def dense_stage(self) -> str:
        """The stage whose model is compressed: the tuned one, or the recipe's model as it came."""
        return "tune" if self.tune else "model"

    @property
    def base_stage(self) -> str:
        """The stage whose model the adapters are trained on."""
        return "reconstruct" if self.reconstruct else self.compressed_stage

    @property
    def compressed_stage(self) -> str:
        """The stage whose model is compressed as far as the recipe goes, by layers."""
        return "quantize" if self.quantize else "sparsify" if self.sparsify else self.dense_stage

    @property
    def merges(self) -> bool:
        """Whether the tuned model becomes one file; plain LoRA stays beside its base."""
        return self.adapters is not None and self.adapters.method != "lora"

    @property
    def adapter_stage(self) -> str:
        """The stage whose adapter is merged, or stands beside its base; without ranks nothing is searched."""
        return "search" if self.adapters is None or self.adapters.low_rank else "train"

    @property
    def final_stage(self) -> str:
        """The stage whose model directory is the recipe's product."""
        return "merge" if self.merges else self.base_stage

    def existing_models(self) -> list[ReportedModel]:
        """Every model that the recipe makes, in order, dense_tuned aside."""
        present: list[tuple[ReportedModel, bool]] = [
            ("base", True),
            ("tuned", self.tune is not None),
            ("sparse", self.sparsify is not None),
            ("quantized", self.quantize is not None),
            ("reconstructed", self.reconstruct is not None),
            ("adapted", self.adapters is not None),
            ("merged", self.merges),
        ]
        return [name for name, there in present if there]

    def reported_models(self) -> list[ReportedModel]:
        """The models that `evaluate` measures."""
        if self.evaluate is None:
            return []
        if self.evaluate.models is not None:
            return self.evaluate.models
        return [name for name in self.existing_models() if name != "adapted" or not self.merges]
