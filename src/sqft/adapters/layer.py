"""One adapter layer for all methods: a base, a low-rank update, a rank, and what keeps the base's form.

    y = x (base + B A scaling)^T                              lora
    y = x round_storage(base + mask * (B A scaling))^T        sparse_peft
    y = x fake_quantize(base + mask * (B A scaling))^T        qa_sparse_peft

The mask is never stored: it is `base != 0`.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from sqft.adapters.config import SqftConfig
from sqft.adapters.identity import base_qparams, base_tensor, base_weight
from sqft.errors import AdapterError
from sqft.ops import (
    QParams,
    adapted_codes,
    adapted_weight,
    decode_latent,
    dequantize,
    encode_latent,
    fake_quantize,
)
from sqft.ops.adapted import low_rank_delta
from sqft.ops.adapted_linear import adapted_linear, frozen_linear
from sqft.ops.kernel_use import kernels_for
from sqft.ops.mask import STRAY_ZEROS
from sqft.ops.weight_blocks import WeightBlocks

__all__ = ["AdapterLinear", "MergedWeight", "check_method", "seeded_generator"]


@dataclass(frozen=True)
class MergedWeight:
    """A merged weight in the form of its base.

    weight (out, in) in the storage dtype, or codes (out, in) uint8 on the grid `qparams`; mask (out, in)
    bool, True = kept. Exactly one of weight and codes is there.
    """

    weight: Tensor | None
    codes: Tensor | None
    qparams: QParams | None
    mask: Tensor

    def dequantized(self) -> Float[Tensor, "out in"]:
        """The float32 weight."""
        if self.codes is not None and self.qparams is not None:
            return dequantize(self.codes, self.qparams)
        assert self.weight is not None
        return self.weight.float()


class AdapterLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft is untyped
    """A linear layer, dense or quantized, with low-rank adapters of which one is active at a time.

    sqft_A[name] (max_rank, in) and sqft_B[name] (out, max_rank); the first active_rank[name] ranks count.
    """

    adapter_layer_names = ("sqft_A", "sqft_B")
    other_param_names = ("active_rank", "settings")

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.in_features = int(base_layer.in_features)  # type: ignore[arg-type]
        self.out_features = int(base_layer.out_features)  # type: ignore[arg-type]
        self.sqft_A = nn.ParameterDict()
        self.sqft_B = nn.ParameterDict()
        self.active_rank: dict[str, int] = {}
        self.settings: dict[str, SqftConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.kept_base: Tensor | None = None
        self.rank_chosen: set[str] = set()
        self.seed_and_step: tuple[int, int] | None = None

    def add_adapter(self, adapter_name: str, config: SqftConfig, generator: torch.Generator) -> None:
        """Add an adapter whose update is 0: A uniform in ±1/sqrt(in), B zero, both float32.

        Raises: AdapterError if the method does not fit the base.
        """
        check_method(config.method, self, self.module_name)
        rank = config.rank_of(self.module_name)
        device = base_weight_device(self.base_layer)
        lora_A = torch.rand(rank, self.in_features, generator=generator) * 2 - 1
        self.sqft_A[adapter_name] = nn.Parameter((lora_A * self.in_features**-0.5).to(device))
        self.sqft_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.active_rank[adapter_name] = rank
        self.settings[adapter_name] = config

    def set_rank(self, rank: int) -> None:
        """Use the first `rank` ranks of the active adapter.

        Raises: AdapterError if the adapter has fewer.
        """
        name = self.active_name()
        if name is None or not 1 <= rank <= self.sqft_A[name].shape[0]:
            there = "no active adapter" if name is None else f"{self.sqft_A[name].shape[0]} ranks"
            raise AdapterError(f"{self.module_name} cannot use rank {rank}: it has {there}")
        self.active_rank[name] = rank
        self.rank_chosen.add(name)

    def active_slice(self, name: str) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """The active part of an adapter: lora_A[:r], lora_B[:, :r]."""
        rank = self.active_rank[name]
        return self.sqft_A[name][:rank], self.sqft_B[name][:, :rank]

    def adapted(self, name: str) -> Float[Tensor, "out in"]:
        """The float32 weight that this layer multiplies with, differentiable in A and B."""
        base, config = base_weight(self), self.settings[name]
        lora_A, lora_B = self.active_slice(name)
        if config.method == "lora":
            return adapted_weight(base, lora_A, lora_B, scaling=config.scaling)
        return adapted_weight(
            base,
            lora_A,
            lora_B,
            scaling=config.scaling,
            mask=base != 0,
            qparams=base_qparams(self),
            storage_dtype=config.rounding_dtype,
        )

    def trained_weight(self) -> Float[Tensor, "out in"]:
        """The float32 weight as the training layer builds it, which `ops.adapted` defines."""
        name = self.active_name()
        assert name is not None
        config, qparams = self.settings[name], base_qparams(self)
        lora_A, lora_B = self.active_slice(name)
        storage = config.rounding_dtype if qparams is None else None
        base = base_tensor(self)
        used = kernels_for(config.kernels, base.device, base.shape, quantized=qparams is not None)
        with torch.no_grad():
            blocks = WeightBlocks(base, lora_A, lora_B, config.scaling, qparams, storage, used)
            return blocks.build(slice(0, self.out_features), torch.float32)

    def merged_weight(self, name: str | None = None) -> MergedWeight:
        """What a merge writes for this layer.

        Raises: AdapterError if the method cannot be merged without losing the zeros or the grid, or the
        merged weight is not finite.
        """
        name = name or self.active_name()
        if name is None or name not in self.sqft_A:
            raise AdapterError(f"{self.module_name} has no adapter '{name}' to merge")
        config, qparams = self.settings[name], base_qparams(self)
        self._check_mergeable(config, qparams)
        with torch.no_grad():
            base = base_weight(self)
            mask = base != 0
            if qparams is None:
                dtype = getattr(torch, config.storage_dtype) if config.storage_dtype else base.dtype
                weight = self.adapted(name).to(dtype)
                self._check_finite(weight)
                return MergedWeight(weight, None, None, mask)
            lora_A, lora_B = self.active_slice(name)
            self._check_finite(low_rank_delta(lora_A, lora_B, config.scaling), qparams.scale)
            codes = adapted_codes(base, lora_A, lora_B, scaling=config.scaling, mask=mask, qparams=qparams)
            return MergedWeight(None, codes, qparams, mask)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapted weight in the place of the base; `unmerge` brings the very same base back.

        safe_merge changes nothing: a merged weight that is not finite is always refused.

        Raises: AdapterError if it cannot be merged.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.sqft_A:
                continue
            if self.merged_adapters:
                raise AdapterError(
                    f"{self.module_name} has a merged adapter; unmerge it before merging '{name}'"
                )
            self._replace_base(self.merged_weight(name))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo `merge`."""
        if self.kept_base is not None:
            self._set_base(self.kept_base)
        self.kept_base = None
        self.merged_adapters.clear()

    def forward(
        self, x: Float[Tensor, "*batch in"], *args: Any, **kwargs: Any
    ) -> Float[Tensor, "*batch out"]:
        """The layer's output with the active adapter, or the base's if there is none."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        name = self.active_name()
        if self.disable_adapters or self.merged or name is None:
            return self._base_forward(x)
        if self.training:
            self._check_rank_is_chosen(name)
        if self.settings[name].method == "lora":
            return self._low_rank_forward(x, name)
        return self._adapted_forward(x, name)

    def _base_forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        if base_qparams(self) is None and not autocast and base_tensor(self).dtype != x.dtype:
            return frozen_linear(x, base_tensor(self), self._bias())
        out: Tensor = self.base_layer(x)
        return out

    def _low_rank_forward(self, x: Tensor, name: str) -> Tensor:
        config = self.settings[name]
        lora_A, lora_B = self._dropped_slice(name)
        update_input = F.dropout(x, config.dropout, self.training) if config.dropout_kind == "token" else x
        if not torch.is_autocast_enabled(x.device.type):
            update_input = update_input.to(lora_A.dtype)
        update = F.linear(F.linear(update_input, lora_A), lora_B) * config.scaling
        result = self._base_forward(x)
        return result + update.to(result.dtype)

    def _adapted_forward(self, x: Tensor, name: str) -> Tensor:
        config, qparams = self.settings[name], base_qparams(self)
        if self.training and config.dropout and config.dropout_kind == "token":
            return self._token_dropout_forward(x, name)
        lora_A, lora_B = self._dropped_slice(name)
        return adapted_linear(
            x,
            base_tensor(self),
            lora_A,
            lora_B,
            self._bias(),
            scaling=config.scaling,
            qparams=qparams,
            storage_dtype=config.rounding_dtype if qparams is None else None,
            gradient=self._gradient(config),
            kernels=config.kernels,
        )

    def _token_dropout_forward(self, x: Tensor, name: str) -> Tensor:
        """The published dropout of the update's input: the base and the update need a product each.

        Autograd keeps the update for backward, and of a quantized base its rounded weight as well.
        """
        config, qparams, base = self.settings[name], base_qparams(self), base_weight(self)
        base = base if qparams is None else fake_quantize(base.float(), qparams)
        update = (self.adapted(name) - base.float()).to(x.dtype)
        result = frozen_linear(x, base, self._bias())
        return result + F.linear(F.dropout(x, config.dropout), update)

    def _dropped_slice(self, name: str) -> tuple[Tensor, Tensor]:
        """The active slice; in training, with the columns of A that this step drops set to 0."""
        config = self.settings[name]
        lora_A, lora_B = self.active_slice(name)
        if self.training and config.dropout and config.dropout_kind == "column":
            seed, step = self._known_step("column dropout")
            generator = seeded_generator(f"{seed}:{step}:{self.module_name}")
            kept = torch.rand(self.in_features, generator=generator) >= config.dropout
            lora_A = lora_A * (kept.to(lora_A) / (1 - config.dropout))
        return lora_A, lora_B

    def _gradient(self, config: SqftConfig) -> Literal["exact", "lowrank"]:
        if config.gradient == "hybrid" and torch.is_grad_enabled():
            _, step = self._known_step("the hybrid gradient")
            return "exact" if step % config.hybrid_steps == 0 else "lowrank"
        return "lowrank" if config.gradient == "lowrank" else "exact"

    def _check_rank_is_chosen(self, name: str) -> None:
        """Refuse to train elastic ranks that nobody draws: only the largest rank would learn anything."""
        config = self.settings[name]
        elastic = len(config.ranks) > 1 and not config.rank_pattern
        trains = torch.is_grad_enabled() and self.sqft_A[name].requires_grad
        if elastic and trains and name not in self.rank_chosen and self.seed_and_step is None:
            raise AdapterError(
                f"ranks {config.ranks} are elastic, and no step has chosen one: give the trainer "
                "callbacks=[sqft.training.RankSampler()], or call sqft.adapters.set_ranks"
            )

    def _known_step(self, what: str) -> tuple[int, int]:
        if self.seed_and_step is None:
            raise AdapterError(
                f"{what} depends on the training step: give the trainer "
                "callbacks=[sqft.training.RankSampler()], or call sqft.adapters.set_step before each"
            )
        return self.seed_and_step

    def active_name(self) -> str | None:
        """The adapter that runs, or None.

        Raises: AdapterError if there are several.
        """
        names = [name for name in self.active_names() if name in self.sqft_A]
        if len(names) > 1:
            raise AdapterError(
                f"{self.module_name} has {len(names)} active adapters; sqft runs one at a time"
            )
        return names[0] if names else None

    def _bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        return bias if isinstance(bias, Tensor) else None

    def active_names(self) -> list[str]:
        """The adapters that are switched on, whether or not this layer has them."""
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    def _check_mergeable(self, config: SqftConfig, qparams: QParams | None) -> None:
        if config.method != "lora":
            return
        if qparams is not None:
            raise AdapterError(
                f"a lora adapter does not merge into the quantized {self.module_name}; train qa_sparse_peft"
            )
        base = base_weight(self)  # a model without stored masks is loaded with its zeros nudged
        if (base.abs() <= torch.finfo(base.dtype).tiny).float().mean() > STRAY_ZEROS:
            raise AdapterError(
                f"merging a lora adapter would fill the zeros of {self.module_name}; train sparse_peft"
            )

    def _check_finite(self, *tensors: Tensor) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise AdapterError(
                f"the merged weight of {self.module_name} is not finite; the adapter is damaged"
            )

    def _replace_base(self, merged: MergedWeight) -> None:
        if merged.codes is None or merged.qparams is None:
            assert merged.weight is not None
            weight = self.base_layer.weight
            assert isinstance(weight, Tensor)
            self.kept_base = weight.data
            self._set_base(merged.weight.to(weight.dtype))
            return
        latent = self.base_layer.latent
        assert isinstance(latent, Tensor)
        self.kept_base = latent
        encoded = encode_latent(merged.dequantized(), merged.codes, merged.mask, merged.qparams)
        self._set_base(decode_latent(encoded, merged.qparams) if latent.is_floating_point() else encoded)

    def _set_base(self, tensor: Tensor) -> None:
        if base_qparams(self) is None:
            self.base_layer.weight.data = tensor
        else:
            self.base_layer.latent = tensor


def check_method(method: str, layer: nn.Module, name: str) -> None:
    """Raises: AdapterError if a method needs another kind of base than this layer."""
    if method == "qa_sparse_peft" and base_qparams(layer) is None:
        raise AdapterError(f"qa_sparse_peft needs a quantized base, and {name} is not; quantize it first")
    if method == "sparse_peft" and base_qparams(layer) is not None:
        raise AdapterError(f"sparse_peft on the quantized {name} would leave its grid; use qa_sparse_peft")


def seeded_generator(text: str) -> torch.Generator:
    """A generator that is a pure function of a text."""
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def base_weight_device(layer: nn.Module) -> torch.device:
    """The device of a layer's tensors."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        return tensor.device
    return torch.device("cpu")
