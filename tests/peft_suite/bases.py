"""Models from configurations in the place of those that PEFT's tests fetch from the hub.

An id of PEFT's gives a tiny dense model of the same family; with " sparse" or " int4" at its end, that model
with half of each linear's weights 0, or those on a grid of 4 bits as well.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from sqft.models.quantized_linear import QuantizedLinear
from sqft.models.saving import save_as_packed
from sqft.ops import GridSpec, compute_qparams, encode_latent, keep_nonzero, mask_rows, quantize
from tests.conftest import _config, _tokenizer

__all__ = ["FAMILIES", "build_base", "build_tokenizer", "prepare"]

GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
# What PEFT's test ids hold → transformers' model type, and its settings beyond those of tests/conftest.py.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "GPTJ": ("gptj", {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8, "n_positions": 512}),
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "Gemma3": ("gemma3_text", GEMMA3),
    "Bert": ("bert", {}),
    "Roberta": ("roberta", {}),
}


def build_base(auto_class: Any, model_id: str, dtype: torch.dtype | None = None, **changes: Any) -> nn.Module:
    """The model of an id: the same numbers at every call."""
    arch, settings = next(value for key, value in FAMILIES.items() if key.lower() in model_id.lower())
    config = _config(arch, **({"num_hidden_layers": 4} | settings | changes))
    torch.manual_seed(0)
    model = auto_class.from_config(config, dtype=dtype or torch.float32)
    model.config._name_or_path = model.name_or_path = model_id
    prepare(model.eval(), model_id)
    if model_id.endswith(" int4"):
        save_as_packed(model)
    return model


def build_tokenizer(model_id: str, **_: Any) -> PreTrainedTokenizerFast:
    """The tests' tokenizer, whatever the id."""
    return _tokenizer()


def prepare(model: nn.Module, model_id: str) -> nn.Module:
    """Prune and quantize what an id says."""
    kind = model_id.rpartition(" ")[2]
    if kind not in ("sparse", "int4"):
        return model
    for seed, (name, linear) in enumerate(list(_linears(model))):
        generator = torch.Generator().manual_seed(seed)
        mask = mask_rows(torch.rand(linear.weight.shape, generator=generator), 0.5)
        weight = linear.weight.detach() * mask
        if kind == "sparse":
            linear.weight.data = keep_nonzero(weight, mask)
            continue
        grid = compute_qparams(weight.float(), GridSpec(4, -1, True))
        latent = encode_latent(weight.float(), quantize(weight.float(), grid), mask, grid)
        parent, _, last = name.rpartition(".")
        bias = None if linear.bias is None else linear.bias.detach()
        coded = QuantizedLinear(latent, grid, bias, dtype=linear.weight.dtype)
        setattr(model.get_submodule(parent), last, coded)
    return model


def _linears(model: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    """All linears of a model without blocks, else those inside them."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [(name, module) for name, module in linears if any(part.isdigit() for part in name.split("."))]
    return inside or linears
