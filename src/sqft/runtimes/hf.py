"""Running model directories in transformers, without a class of ours."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from sqft.models import load_model, open_checkpoint
from sqft.models.tokenizer import quiet_transformers

__all__ = ["open_in_transformers", "run_model", "run_transformers"]


def run_model(model: nn.Module, items: Sequence[Sequence[int]]) -> Float[Tensor, "positions vocabulary"]:
    """Float32 logits at every position of every item."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([list(item)])).logits[0].float() for item in items])


def open_in_transformers(directory: Path, adapter: Path | None = None, *, packed: bool = False) -> Any:
    """A model directory in float32, to generate with. packed: computes from its packed form.

    adapter: a plain LoRA in PEFT's files, applied unmerged.

    Raises: ModelError if the directory is not a whole model.
    """
    if packed:
        import sqft.runtimes.packed  # noqa: F401  enters the form into transformers' tables

        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    else:
        model = load_model(directory, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    return model


def run_transformers(
    directory: Path, items: Sequence[Sequence[int]]
) -> Float[Tensor, "positions vocabulary"]:
    """Float32 logits of a model directory that plain transformers opens."""
    options: dict[str, Any] = {"dtype": torch.float32}
    grid = open_checkpoint(directory).grid
    if grid is not None and not grid.symmetric:  # the default of transformers 5.23 fails on zero points
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings(), quiet_transformers():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
    for parameter in model.parameters():
        if parameter.ndim == 3:  # experts, which stay in the dtype of their scales, whatever is asked for
            parameter.data = parameter.data.float()
    return run_model(model, items)
