"""What compression does to the weights: which become zero, and the grid that the others are rounded to."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from sqft import patterns
from sqft.sections.base import Fraction, ModuleNames, Positive, Section

__all__ = ["QuantizeSection", "ReconstructSection", "SparsifySection"]


def _check_pattern(value: str) -> str:
    return str(patterns.Pattern.parse(value))


Pattern = Annotated[str, AfterValidator(_check_pattern)]
SparsifyTarget = Literal["cpu"]
QuantizeTarget = Literal["gguf-q4_0", "gguf-q4_1", "gguf-q8_0", "gptq", "openvino"]
# What a target fixes, and what it takes unless the recipe says otherwise. GGUF has blocks of 32.
TARGET_GRIDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gguf-q4_0": ({"bits": 4, "symmetric": True}, {"group_size": 32}),
    "gguf-q4_1": ({"bits": 4, "symmetric": False, "scale_bits": 7}, {"group_size": 32}),
    "gguf-q8_0": ({"bits": 8, "symmetric": True}, {"group_size": 32}),
    "gptq": ({}, {"group_size": 128}),
    "openvino": ({}, {}),
}


class SparsifySection(Section):
    """Which weights become zero."""

    method: Literal["wanda", "magnitude", "ria", "sparsegpt"] = "wanda"
    sparsity: Fraction = Field(
        0.5, lt=1, description="Fraction of zeros; with a pattern it follows from the pattern."
    )
    pattern: Pattern | None = Field(
        None, description="N:M, N kept of every M neighbours, as 2:4; N:M window B, as 16:32 window 2."
    )
    target: SparsifyTarget | None = Field(
        None, description="cpu: the pattern that CPUs decode fastest, at sparsity 0.5, 0.625 or 0.75."
    )
    target_modules: ModuleNames | None = Field(
        None,
        description="Names or name ends of linears, or patterns such as layers.0.* or *_proj; in place of "
        "the list, a regular expression over whole names, or all-linear. Default all in the blocks.",
    )
    skip_modules: ModuleNames = Field([], description="Linears to leave dense, named as in target_modules.")
    budget: Literal["uniform", "arithmetic", "owl"] = Field(
        "uniform", description="How blocks share the zeros; arithmetic: more with depth; owl: by outliers."
    )
    budget_spread: float = Field(
        0.08, ge=0, le=0.5, description="How far a block may be off, where the budget is not uniform."
    )
    swaps: int = Field(
        0, ge=0, description="Maximum mask swaps per row, chosen on the Gram matrix of the inputs."
    )
    refit: int = Field(0, ge=0, description="Steps of least squares for the kept weights; 0 leaves them.")
    dense_targets: bool = Field(
        False,
        description="Aim at what the uncompressed model puts out (ours); keeps two sets of activations.",
    )
    sequential: bool = Field(
        False, description="Inside a block, later layers see the compressed earlier ones; more passes."
    )
    damping: float = Field(0.01, gt=0, le=1, description="Share of the Hessian's mean diagonal added to it.")

    @model_validator(mode="before")
    @classmethod
    def _target(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("target") != "cpu" or values.get("pattern") is not None:
            return values
        sparsity = values.get("sparsity", 0.5)
        if not isinstance(sparsity, float) or sparsity not in patterns.CPU_PATTERNS:
            known = ", ".join(map(str, patterns.CPU_PATTERNS))
            raise ValueError(f"target cpu has a pattern for sparsity {known}, not for {sparsity}")
        others = {name: value for name, value in values.items() if name != "sparsity"}
        return others | {"pattern": patterns.CPU_PATTERNS[sparsity]}

    @model_validator(mode="after")
    def _decoded(self) -> "SparsifySection":
        if self.target == "cpu" and self.pattern not in patterns.CPU_DECODED:
            known = ", ".join(patterns.CPU_DECODED)
            raise ValueError(f"target cpu has no fast kernel for pattern {self.pattern}, but for {known}")
        return self

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
    scale_search: bool = Field(False, description="Try smaller scales than the one that covers a group.")
    refit: int = Field(
        0, ge=0, description="Steps of least squares for the kept weights before they are rounded."
    )
    sequential: bool = Field(
        False, description="Inside a block, later layers see the compressed earlier ones; more passes."
    )
    sparsity: Fraction = Field(0.5, lt=1, description="Fraction of zeros, for method joint only.")
    pattern: Pattern | None = Field(None, description="As in sparsify, for method joint only.")
    target_modules: ModuleNames | None = Field(None, description="As in sparsify.")
    skip_modules: ModuleNames = Field([], description="Linears to leave in 16 bits, named as in sparsify.")
    head: Literal["int8"] | None = Field(
        None,
        description="int8: embedding and output head in 8 bits, exact in GGUF's Q8_0; else they keep 16.",
    )
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
            raise ValueError(f"target {target} needs a group_size that is a multiple of 32, as 32 or 64")
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
            ignored["scale_fit"] = "only the sweeps of descent use it, and there are 0"
        return ignored

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("write a positive number, or -1 for one group a row")
        return value


class ReconstructSection(Section):
    """Each block of the compressed model fitted to the dense one on the calibration; zeros and grid stay."""

    least_sequences: ClassVar[int] = 8  # of calibration, since one of so many is held out

    train_weights: bool = Field(
        True,
        description="The weights that are kept, of a quantized model before they are rounded to its grid.",
    )
    train_scales: bool | None = Field(
        None, description="The group scales of a quantized model; default where there are any."
    )
    train_norms: bool = Field(True, description="The weights of the norms in the blocks.")
    epochs: Positive = Field(4, description="Passes over the calibration; of each block the best is kept.")
    batch_size: Positive = Field(2, description="Calibration sequences of an optimizer step.")
    learning_rate: float = Field(
        1e-2,
        gt=0,
        le=1,
        description="Of weights: the share of a row's root mean square that a step of Adam moves.",
    )
    scale_learning_rate: float = Field(
        5e-3, gt=0, le=1, description="Of scales: the share of a scale that a step of Adam moves."
    )
    norm_learning_rate: float = Field(
        1e-2,
        gt=0,
        le=1,
        description="Of norms: the share of a norm's root mean square that a step of Adam moves.",
    )

    @property
    def calibrates(self) -> bool:
        """It always looks at activations."""
        return True

    def held_out(self, num_samples: int) -> int:
        """How many of so many calibration sequences are held out: an eighth."""
        return num_samples // self.least_sequences

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each kind of number that is fitted, scales where there are any."""
        rates = {
            "weights": (self.train_weights, self.learning_rate),
            "scales": (self.train_scales is not False, self.scale_learning_rate),
            "norms": (self.train_norms, self.norm_learning_rate),
        }
        return {kind: rate for kind, (fitted, rate) in rates.items() if fitted}

    def without_effect(self) -> dict[str, str]:
        """The rate of what is not fitted."""
        names = {"weights": "learning_rate", "scales": "scale_learning_rate", "norms": "norm_learning_rate"}
        return {name: f"{kind} are not fitted" for kind, name in names.items() if kind not in self.rates}

    @model_validator(mode="after")
    def _something(self) -> "ReconstructSection":
        if not self.rates:
            raise ValueError("nothing would be fitted; set train_weights, train_scales or train_norms")
        return self
