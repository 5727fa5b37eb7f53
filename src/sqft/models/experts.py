"""The experts of a mixture, which transformers computes with in one tensor, as linears of their own.

    y_t = sum over the experts e that the router chose for t of  w_te * down_e(act(gate_e x_t) * up_e x_t)

Files keep each expert by itself (`mlp.experts.3.up_proj.weight`), INT4 files of runtimes too: with linears of
its own, an expert's masks, grids, adapters and names are those of any other linear.

Differs from transformers: it multiplies gate and up in one product, so that sums may be rounded otherwise.
"""

import re

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from sqft.ops import GridSpec

__all__ = ["SeparateExperts", "has_experts", "scale_dtype", "separate_experts", "show_every_token"]

# Model types whose experts compute the formula above; each is compared with transformers by a test.
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
NAMES = re.compile(r"experts\.\*\.(\w+)\.weight")


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)), its linears under the names that the files of its family have."""

    def __init__(self, names: tuple[str, str, str], width: int, inner: int, act: nn.Module) -> None:
        super().__init__()
        self._names = names
        gate, up, down = names
        self.add_module(gate, nn.Linear(width, inner, bias=False, device="meta"))
        self.add_module(up, nn.Linear(width, inner, bias=False, device="meta"))
        self.add_module(down, nn.Linear(inner, width, bias=False, device="meta"))
        self.act_fn = act

    def forward(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """The expert's answer."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        out: Tensor = down(self.act_fn(gate(x)) * up(x))
        return out


class SeparateExperts(nn.ModuleList):
    """The experts of one block, in the place of the module that holds them in one tensor.

    every_token: run every expert on every token, and count its answers only where it was chosen. So a
    calibration shows every expert the same tokens, of which the router may have given it few or none.
    """

    every_token = False

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens width"],
        top_k_index: Integer[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens width"]:
        """The weighted sum of the chosen experts' answers."""
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if self.every_token:
                answer = expert(hidden_states)[token]
            elif len(token):
                answer = expert(hidden_states[token])
            else:
                continue
            answer = answer * top_k_weights[token, place, None]
            total.index_add_(0, token, answer.to(total.dtype))
        return total


def separate_experts(model: PreTrainedModel) -> None:
    """Exchange the experts of a model without data (meta device) for `SeparateExperts`, where it has such."""
    if model.config.model_type not in FAMILIES:
        return
    names = _names(model)
    for path, module in list(model.named_modules()):
        fused = getattr(module, "gate_up_proj", None)
        if isinstance(fused, nn.Parameter) and fused.ndim == 3:
            count, double, width = fused.shape
            act = module.act_fn
            assert isinstance(act, nn.Module)
            experts = SeparateExperts(Expert(names, width, double // 2, act) for _ in range(count))
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, experts)


def _names(model: PreTrainedModel) -> tuple[str, str, str]:
    """What files call gate, up and down of an expert, by transformers' `conversion_mapping`."""
    found: list[str] = []
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(transform, WeightConverter):
            found += [match.group(1) for text in transform.source_patterns if (match := NAMES.search(text))]
    gate, up, down = found
    return gate, up, down


def show_every_token(model: nn.Module) -> None:
    """Let every expert see every token, for calibration; what the model computes stays the same."""
    for module in model.modules():
        if isinstance(module, SeparateExperts):
            module.every_token = True


def has_experts(model: nn.Module) -> bool:
    """Whether experts of a model stand as linears of their own here."""
    return any(isinstance(module, SeparateExperts) for module in model.modules())


def scale_dtype(model: nn.Module, grid: GridSpec) -> torch.dtype | None:
    """The dtype in which transformers must find the scales, to read exact weights; None: that of the grid.

    It multiplies the codes of experts in the dtype of their scales, where bfloat16 would round the product
    of 3 and 8 bits.
    """
    if not has_experts(model) or grid.scale_dtype == torch.float32:
        return grid.stored_dtype
    return torch.float16 if grid.bits <= 4 and grid.scale_bits <= 8 else torch.float32
