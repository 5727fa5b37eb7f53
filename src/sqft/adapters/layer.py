"""One adapter layer for all methods: a base, a low-rank update, a rank, and what keeps the base's form.

    y = x (base + B A scaling)^T                              lora
    y = x round_storage(base + mask * (B A scaling))^T        sparse_peft
    y = x fake_quantize(base + mask * (B A scaling))^T        qa_sparse_peft
    y = x ((codes - zero_point) * scale)^T                    scales: codes frozen, scale trained

With qa_sparse_peft the scale may be trained too: codes are those of the base's grid, and the trained scale is
what they are multiplied with. The mask is never stored: it is `base != 0`.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sqft.adapters.checks import check_method, check_scale_values
from sqft.adapters.config import SqftConfig
from sqft.adapters.identity import base_codes, base_qparams, base_tensor, base_weight
from sqft.adapters.tuner_layer import TunerLayer, device_of, start_values
from sqft.errors import AdapterError
from sqft.kernels.choices import TORCH
from sqft.ops import (
    QParams,
    QuantizedWeight,
    adapted_codes,
    adapted_weight,
    decode_latent,
    dequantize,
    encode_latent,
    fake_quantize,
)
from sqft.ops.adapted import exact_float32, low_rank_delta
from sqft.ops.adapted_linear import adapted_linear, frozen_linear
from sqft.ops.kernel_use import kernels_for
from sqft.ops.mask import STRAY_ZEROS
from sqft.ops.scaled_linear import scaled_linear, scaled_weight
from sqft.ops.trained import trained_scale
from sqft.ops.weight_blocks import WeightBlocks

__all__ = ["AdapterLinear", "MergedWeight", "seeded_generator"]


@dataclass(frozen=True)
class MergedWeight:
    """A merged weight in the form of its base.

    weight: (out, in) in the storage dtype, or codes on the base's grid, whose scales may be trained ones.
    mask: (out, in) bool, True = kept; of a base that holds codes alone, and so no mask, the weights that are
    not 0.
    """

    weight: Tensor | QuantizedWeight
    mask: Tensor

    def dequantized(self) -> Float[Tensor, "out in"]:
        """The float32 weight."""
        return self.weight.float() if isinstance(self.weight, Tensor) else self.weight.dequantize()


class AdapterLinear(TunerLayer):
    """A linear layer, dense or quantized, with adapters: a low-rank update, trained scales, or both.

    sqft_A[name] (max_rank, in) and sqft_B[name] (out, max_rank), float32 unless PEFT's
    autocast_adapter_dtype is False; the first active_rank[name] ranks
    count. sqft_scale[name] (out, groups) float32: the change of the scales, as a share of the base's.
    """

    adapter_layer_names = ("sqft_A", "sqft_B", "sqft_scale")
    other_param_names = ("active_rank", "settings")
    sqft_A: nn.ParameterDict
    sqft_B: nn.ParameterDict
    sqft_scale: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__(base_layer, module_name)
        self.in_features = int(base_layer.in_features)  # type: ignore[arg-type]
        self.out_features = int(base_layer.out_features)  # type: ignore[arg-type]
        self.active_rank: dict[str, int] = {}
        self.rank_chosen: set[str] = set()
        self.seed_and_step: tuple[int, int] | None = None

    def add_adapter(
        self, adapter_name: str, config: SqftConfig, generator: torch.Generator, *, low_rank: bool
    ) -> None:
        """Add an adapter that changes nothing: A uniform in ±1/sqrt(in), B and the change of scales zero.

        With `config.init_weights` False those two are random as well.

        low_rank: whether it has an A and a B here. It has scales here if config.scale_modules says so.

        Raises: AdapterError if the method does not fit the base.
        """
        check_method(config.method if low_rank else "scales", self, self.module_name)
        device = device_of(self.base_layer)
        if low_rank:
            rank = config.rank_of(self.module_name)
            lora_A = torch.rand(rank, self.in_features, generator=generator) * 2 - 1
            self.sqft_A[adapter_name] = nn.Parameter((lora_A * self.in_features**-0.5).to(device))
            lora_B = start_values((self.out_features, rank), config, generator)
            self.sqft_B[adapter_name] = nn.Parameter(lora_B.to(device))
            self.active_rank[adapter_name] = rank
        if self.module_name in config.scale_modules:
            qparams = base_qparams(self)
            assert qparams is not None
            if adapter_name not in self.sqft_A and base_tensor(self).is_floating_point():
                raise AdapterError(
                    f"{self.module_name} is held in float32, which has no codes to freeze; load the base "
                    "with base_precision packed or latent"
                )
            change = start_values(qparams.scale.shape, config, generator)
            self.sqft_scale[adapter_name] = nn.Parameter(change.to(device))
        self.settings[adapter_name] = config

    def set_rank(self, rank: int) -> None:
        """Use the first `rank` ranks of the active adapter; with 0 the base is left as it is.

        Raises: AdapterError if the adapter has fewer.
        """
        name = self.active_name()
        if name is None or not 0 <= rank <= self.sqft_A[name].shape[0]:
            there = "no active adapter" if name is None else f"{self.sqft_A[name].shape[0]} ranks"
            raise AdapterError(f"{self.module_name} cannot use rank {rank}: it has {there}")
        self.active_rank[name] = rank
        self.rank_chosen.add(name)

    def active_slice(self, name: str) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """The active part of an adapter, float32 however it is kept: lora_A[:r], lora_B[:, :r]."""
        rank = self.active_rank[name]
        return self.sqft_A[name][:rank].float(), self.sqft_B[name][:, :rank].float()

    def trained_scale(self, name: str) -> Float[Tensor, "out groups"] | None:
        """The trained scales, rounded to what is stored, differentiable in their change; None without any."""
        qparams = base_qparams(self)
        if name not in self.sqft_scale or qparams is None:
            return None
        bits = self.settings[name].scale_bits
        assert bits is not None
        return trained_scale(qparams.scale, self.sqft_scale[name].float(), bits)

    def adapted(self, name: str) -> Float[Tensor, "out in"]:
        """The float32 weight that this layer multiplies with, differentiable in A, B and the scales."""
        config = self.settings[name]
        if name not in self.sqft_A:
            return dequantize(base_codes(self), self._trained_grid(name))
        base = base_weight(self)
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
            scale=self.trained_scale(name),
            storage_dtype=config.rounding_dtype,
        )

    def trained_weight(self) -> Float[Tensor, "out in"]:
        """The float32 weight as the training layer builds it, which `ops.adapted` and `ops.grid` define."""
        name = self.active_name()
        assert name is not None
        with torch.no_grad(), exact_float32(base_tensor(self).device):
            if name not in self.sqft_A:
                stored, latent = self._stored_codes()
                return scaled_weight(stored, self._trained_grid(name), self.in_features, latent=latent)
            config, base, qparams = self.settings[name], base_tensor(self), base_qparams(self)
            lora_A, lora_B = self.active_slice(name)
            storage, scale = config.rounding_dtype if qparams is None else None, self.trained_scale(name)
            used = TORCH
            if scale is None:
                used = kernels_for(config.kernels, base.device, base.shape, quantized=qparams is not None)
            blocks = WeightBlocks(base, lora_A, lora_B, config.scaling, qparams, storage, used, scale)
            return blocks.build(slice(0, self.out_features), torch.float32)

    def merged_weight(self, name: str | None = None) -> MergedWeight:
        """What a merge writes for this layer.

        Raises: AdapterError if the method cannot be merged without losing the zeros or the grid, the merged
        weight is not finite, or a trained scale is not a positive number.
        """
        name = name or self.active_name()
        if name is None or name not in self.settings:
            raise AdapterError(f"{self.module_name} has no adapter '{name}' to merge")
        config, qparams = self.settings[name], base_qparams(self)
        self._check_mergeable(config, qparams)
        with torch.no_grad():
            if qparams is None:
                base = base_weight(self)
                dtype = getattr(torch, config.storage_dtype) if config.storage_dtype else base.dtype
                weight = self.adapted(name).to(dtype)
                self._check_finite(weight)
                return MergedWeight(weight, base != 0)
            self.check_scales(name)
            merged = self._trained_grid(name)
            if name not in self.sqft_A:
                return MergedWeight(QuantizedWeight(base_codes(self), merged), base_weight(self) != 0)
            base = base_weight(self)
            lora_A, lora_B = self.active_slice(name)
            self._check_finite(low_rank_delta(lora_A, lora_B, config.scaling), qparams.scale)
            codes = adapted_codes(
                base, lora_A, lora_B, scaling=config.scaling, mask=base != 0, qparams=qparams
            )
            return MergedWeight(QuantizedWeight(codes, merged), base != 0)

    def check_scales(self, name: str) -> None:
        """Raises: AdapterError if a trained scale is not a finite number above 0."""
        if name not in self.sqft_scale:
            return
        change = self.sqft_scale[name].detach()
        check_scale_values(1 + change, f"the trained scales of {self.module_name}")

    def stored_scale(self, name: str, change: Tensor) -> Float[Tensor, "out groups"]:
        """The trained scales that a change gives, in the smallest dtype that holds them exactly.

        Raises: AdapterError if one is not a finite number above 0.
        """
        qparams, bits = base_qparams(self), self.settings[name].scale_bits
        assert qparams is not None
        assert bits is not None
        check_scale_values(1 + change, f"the trained scales of {self.module_name}")
        scale = trained_scale(qparams.scale, change.to(qparams.scale), bits)
        narrow = (torch.bfloat16, torch.float16)
        return next((scale.to(d) for d in narrow if torch.equal(scale.to(d).float(), scale)), scale)

    def change_of_scale(self, stored: Tensor) -> Float[Tensor, "out groups"]:
        """The change that gives stored scales.

        Raises: AdapterError if they are not of the base's shape, or one is not a finite number above 0.
        """
        qparams = base_qparams(self)
        assert qparams is not None
        if stored.shape != qparams.scale.shape:
            raise AdapterError(
                f"the adapter's scales of {self.module_name} are {tuple(stored.shape)}, the base's "
                f"{tuple(qparams.scale.shape)}; it belongs to another grid"
            )
        check_scale_values(stored, f"the adapter's scales of {self.module_name}")
        return stored.to(qparams.scale) / qparams.scale - 1

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
        if name not in self.sqft_A:
            stored, latent = self._stored_codes()
            return scaled_linear(x, stored, self._trained_grid(name), self._bias(), latent=latent)
        if config.method == "lora":
            return self._low_rank_forward(x, name)
        if self.training and config.dropout and config.dropout_kind == "token":
            return self._token_dropout_forward(x, name)
        if not self.training and (x.device.type != "cpu" or config.kernels == "triton"):
            # A kernel for training may round one weight in a million to its other neighbour. What is
            # evaluated is what a merge writes.
            bias = self._bias()
            weight = self.adapted(name).to(x.dtype)
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        lora_A, lora_B = self._dropped_slice(name)
        return adapted_linear(
            x,
            base_tensor(self),
            lora_A,
            lora_B,
            self._bias(),
            scaling=config.scaling,
            qparams=qparams,
            scale=self.trained_scale(name),
            storage_dtype=config.rounding_dtype if qparams is None else None,
            gradient=self._gradient(config),
            kernels=config.kernels,
        )

    def _trained_grid(self, name: str) -> QParams:
        qparams, scale = base_qparams(self), self.trained_scale(name)
        assert qparams is not None
        return qparams if scale is None else replace(qparams, scale=scale)

    def _stored_codes(self) -> tuple[Tensor, bool]:
        """The tensor that holds the base's codes, and whether it is a latent."""
        return base_tensor(self), hasattr(self.base_layer, "latent")

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

    def _check_step(self, name: str) -> None:
        """Refuse to train elastic ranks that no trainer sets: only the largest rank would be trained."""
        config = self.settings[name]
        elastic = name in self.sqft_A and len(config.ranks) > 1 and not config.rank_pattern
        trains = self.training and torch.is_grad_enabled() and elastic and self.sqft_A[name].requires_grad
        if trains and name not in self.rank_chosen and self.seed_and_step is None:
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

    def _bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        return bias if isinstance(bias, Tensor) else None

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

    def replacement(self, name: str) -> dict[str, Tensor]:
        """The merged weight in the form of the base: a float weight, or codes and trained scales."""
        merged = self.merged_weight(name)
        if isinstance(merged.weight, Tensor):
            return {"weight": merged.weight}
        codes, qparams = merged.weight.codes, merged.weight.qparams
        replaced = {"scale": qparams.scale} if name in self.sqft_scale else {}
        if name not in self.sqft_A:
            return replaced
        encoded = encode_latent(merged.dequantized(), codes, merged.mask, qparams)
        decoded = base_tensor(self).is_floating_point()
        return replaced | {"latent": decode_latent(encoded, qparams) if decoded else encoded}


def seeded_generator(text: str) -> torch.Generator:
    """A generator that is a pure function of a text."""
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
