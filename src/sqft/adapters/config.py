"""What is stored of an adapter beside its tensors."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import torch
from peft import PeftConfig

from sqft.errors import AdapterError
from sqft.ops.adapted_linear import GRADIENTS, check_choice
from sqft.ops.kernel_use import KERNELS
from sqft.sections import AdapterSection

__all__ = ["METHODS", "PEFT_TYPE", "SqftConfig"]


class SqftType(StrEnum):
    """Our entry beside PEFT's own enumeration of types, whose members have a `value`, as callers expect."""

    SQFT = "SQFT"


PEFT_TYPE = SqftType.SQFT
# What PEFT trains and saves whole beside the adapters of a task, under the names of transformers' classes.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
METHODS = ("lora", "sparse_peft", "qa_sparse_peft", "scales")
STORAGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULTS = AdapterSection()
DEFAULT_RANK_GROUPS = (("q_proj", "k_proj", "v_proj"),)


@dataclass
class SqftConfig(PeftConfig):  # type: ignore[misc]  # peft is untyped
    """The configuration of an sqft adapter, as PEFT stores it in `adapter_config.json`.

    method: lora, sparse_peft, qa_sparse_peft, or scales, which trains no low-rank update.
    train_scales, train_norms: train the scales of every quantized linear, and the weights of the norms; None:
        where the method is scales.
    ranks: the ranks a rank group may have; the first is the maximal one. One entry: a fixed rank. With 0 a
        group may be left as it is.
    rank_pattern: the rank of every module of an extracted sub-adapter; empty for a super-adapter.
    alpha: the update is scaled by alpha / max(ranks), whatever rank is active.
    dropout, dropout_kind: column = whole columns of lora_A, drawn once a step from (seed, step);
        token = the published dropout of the input, which costs a second product and keeps the update
        for backward.
    target_modules: name ends that match whole components; or one text, all-linear or a regular expression for
        full names; full names once the adapter is attached. Of method scales: the linears whose scales are
        trained, by default all quantized ones.
    layers_to_transform: the numbers of the blocks that get an adapter; None: all of them. None once attached.
    exclude_modules: what to leave out of them, named in the same way; None once the adapter is attached.
    scale_modules, norm_modules: the linears and norms that are trained, by full name; set when attached.
    scale_bits, norm_dtype: the significant bits of a trained scale, and the dtype that a trained norm is
        stored in: those of the base, set when it is attached.
    rank_groups: name ends that share a rank inside a block; None: q, k, v together, others alone.
    gradient: exact, lowrank, or hybrid (exact every `hybrid_steps`-th step).
    kernels: auto, what was measured to be faster on this kind of card; torch; or triton on an NVIDIA GPU
        (elsewhere it is torch, with a warning).
    storage_dtype: the dtype merged weights are stored in. None takes, when the adapter is attached, that of
        the weights; for sparse_peft, which trains on rounded weights, the narrowest one that holds them all:
        bfloat16 for a bfloat16 checkpoint opened in float32.
    modules_to_save: modules beside the adapted ones that are trained and saved whole; the task types SEQ_CLS,
        TOKEN_CLS and QUESTION_ANS add their head.
    identity: sha256 of what the adapter belongs to, base, mask, grid, codes, norms; set when it is attached.
    init_seed: lora_A is a function of this seed and of the module's name.
    init_weights: False starts lora_B and the changes of scales and norms at random numbers too, so that the
        new adapter already changes the model; for tests, as of PEFT's own methods.
    """

    method: str = "sparse_peft"  # not the recipe's default, which needs a quantized base
    train_scales: bool | None = None
    train_norms: bool | None = None
    ranks: list[int] = field(default_factory=lambda: list(DEFAULTS.ranks))
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha: float = DEFAULTS.alpha
    dropout: float = DEFAULTS.dropout
    dropout_kind: Literal["column", "token"] = DEFAULTS.dropout_kind
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    scale_modules: list[str] = field(default_factory=list)
    norm_modules: list[str] = field(default_factory=list)
    scale_bits: int | None = None
    norm_dtype: str | None = None
    rank_groups: list[list[str]] | None = None
    gradient: Literal["exact", "lowrank", "hybrid"] = DEFAULTS.gradient
    hybrid_steps: int = DEFAULTS.hybrid_steps
    kernels: Literal["auto", "torch", "triton"] = DEFAULTS.kernels
    storage_dtype: str | None = None
    modules_to_save: list[str] | None = None
    identity: dict[str, str] = field(default_factory=dict)
    init_seed: int = 0
    init_weights: bool = True
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.method not in METHODS:
            raise AdapterError(f"adapter method '{self.method}' is unknown; choose from {', '.join(METHODS)}")
        self._resolve_trained()
        wrong = any(not isinstance(rank, int) or rank < 0 for rank in self.ranks)
        if wrong or (self.low_rank and not any(self.ranks)):
            raise AdapterError(f"ranks {self.ranks} must be whole numbers, one of them above 0, none below")
        check_choice("gradient", self.gradient, (*GRADIENTS, "hybrid"))
        check_choice("kernels", self.kernels, KERNELS)
        check_choice("dropout_kind", self.dropout_kind, ("column", "token"))
        if self.storage_dtype is not None:
            check_choice("storage_dtype", self.storage_dtype, tuple(STORAGE_DTYPES))
        for name, ok, wanted in (
            ("alpha", self.alpha > 0, "above 0"),
            ("dropout", 0 <= self.dropout < 1, "from 0 to below 1"),
            ("hybrid_steps", self.hybrid_steps >= 1, "at least 1"),
        ):
            if not ok:
                raise AdapterError(f"{name} {getattr(self, name)} must be {wanted}")
        if self.method == "lora" and self.gradient != "exact":
            raise AdapterError(f"gradient '{self.gradient}' has no meaning for lora; leave it at exact")
        if self.method == "lora" and self.kernels == "triton":
            raise AdapterError("kernels 'triton' has no meaning for lora; leave it at auto")
        if self.token_dropout and (self.gradient != "exact" or self.kernels == "triton"):
            raise AdapterError(
                "dropout_kind token computes base and update apart, with the exact gradient and by torch; "
                "set dropout_kind: column, or remove gradient and kernels"
            )
        self.ranks = sorted(set(self.ranks), reverse=True)
        if self.task_type in TASK_HEADS:
            self.modules_to_save = list(
                dict.fromkeys([*(self.modules_to_save or []), *TASK_HEADS[self.task_type]])
            )

    def _resolve_trained(self) -> None:
        """What is trained beside, or in the place of, a low-rank update."""
        if self.train_scales is None:
            self.train_scales = self.method == "scales"
        if self.train_norms is None:
            self.train_norms = self.method == "scales"
        if not self.low_rank:
            self.ranks = []
            if not self.train_scales:
                raise AdapterError("method scales without train_scales trains no linear; remove train_scales")
        if self.train_scales and self.method in ("lora", "sparse_peft"):
            raise AdapterError(f"{self.method} has no scales to train; use scales or qa_sparse_peft")
        if self.train_norms and self.method == "lora":
            raise AdapterError(
                "norms are trained where an adapter merges, and lora does not; use another method"
            )
        if self.train_scales and (self.gradient != "exact" or self.kernels == "triton"):
            raise AdapterError(
                "trained scales need gradient exact, and kernels auto or torch; remove the two settings"
            )
        if self.train_scales and self.token_dropout:
            raise AdapterError("trained scales need dropout_kind: column")

    @property
    def low_rank(self) -> bool:
        """Whether there is a low-rank update."""
        return self.method != "scales"

    @property
    def token_dropout(self) -> bool:
        """Whether a masked adapter trains with the published dropout."""
        return self.method not in ("lora", "scales") and self.dropout > 0 and self.dropout_kind == "token"

    @property
    def max_rank(self) -> int:
        """The largest rank, by which alpha is divided at every rank."""
        return self.ranks[0]

    @property
    def scaling(self) -> float:
        """alpha / max_rank."""
        return self.alpha / self.max_rank

    @property
    def rounding_dtype(self) -> torch.dtype | None:
        """The 16-bit dtype that adapted weights are rounded to, if weights are stored in one."""
        dtype = getattr(torch, self.storage_dtype) if self.storage_dtype else None
        return dtype if dtype in (torch.bfloat16, torch.float16) else None

    def rank_of(self, module: str) -> int:
        """How many ranks the adapter of a module has."""
        return self.rank_pattern.get(module, self.max_rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the JSON file."""
        values: dict[str, Any] = super().to_dict()
        if not isinstance(self.target_modules, str):
            values["target_modules"] = sorted(self.target_modules or []) or None
        return values
