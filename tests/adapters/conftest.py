"""Tiny sparse and sparse-quantized models that adapters are attached to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sqft.adapters.targets import find_targets
from sqft.models.quantized_linear import QuantizedLinear
from sqft.ops import (
    GridSpec,
    compute_qparams,
    decode_latent,
    encode_latent,
    keep_nonzero,
    mask_rows,
    quantize,
)


def random_mask(weight: Tensor, sparsity: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mask_rows(torch.rand(weight.shape, generator=generator), sparsity)


@pytest.fixture
def sparse_model(tiny_model_dir: Callable[..., Any]) -> Callable[..., nn.Module]:
    """`sparse_model(arch, dtype=torch.float32, sparsity=0.5)`."""

    def make(arch: str = "llama", *, dtype: torch.dtype = torch.float32, sparsity: float = 0.5) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(arch), dtype=dtype)
        for seed, linear in enumerate(find_targets(model, None).values()):
            weight = linear.get_parameter("weight")
            weight.data = keep_nonzero(weight.data, random_mask(weight, sparsity, seed))
        return model

    return make


@pytest.fixture
def quantized_model(tiny_model_dir: Callable[..., Any]) -> Callable[..., nn.Module]:
    """`quantized_model(arch, sparsity=0.5, bits=4, symmetric=True, group_size=32, latents=True)`."""

    def make(
        arch: str = "llama",
        *,
        sparsity: float = 0.5,
        bits: int = 4,
        symmetric: bool = True,
        group_size: int = 32,
        latents: bool = True,
    ) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(arch), dtype=torch.float32)
        for seed, (name, linear) in enumerate(find_targets(model, None).items()):
            assert isinstance(linear, nn.Linear)
            mask = random_mask(linear.weight, sparsity, seed)
            parent, _, last = name.rpartition(".")
            weight = linear.weight.detach() * mask
            grid = compute_qparams(weight, GridSpec(bits, group_size, symmetric))
            latent = encode_latent(weight, quantize(weight, grid), mask, grid)
            coded = QuantizedLinear(latent if latents else decode_latent(latent, grid), grid, linear.bias)
            setattr(model.get_submodule(parent), last, coded)
        return model.requires_grad_(False)

    return make


@pytest.fixture
def make_base(sparse_model: Any, quantized_model: Any) -> Callable[..., nn.Module]:
    """The base that suits a method: `make_base(method, arch)`."""

    def make(method: str, arch: str = "llama", **changes: Any) -> nn.Module:
        if method == "qa_sparse_peft":
            return quantized_model(arch, **changes)
        return sparse_model(arch, **({"sparsity": 0.0} if method == "lora" else {}) | changes)

    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(4, 288, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def randomize() -> Callable[[nn.Module], None]:
    """Give every adapter an update that matters."""

    def fill(peft_model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if "sqft_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1

    return fill
