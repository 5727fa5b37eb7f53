"""Architectures that differ from Llama before or between their blocks, and those that are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.families import FAMILIES
from transformers import AutoModelForCausalLM

from sqft.compression.walk import BlockWalk
from sqft.errors import ModelError
from sqft.models import load_model, model_outline, open_checkpoint
from sqft.models.writer import write_model
from sqft.sections import ModelSection

# Positions in an embedding of their own, a norm before the blocks, blocks that return tuples, a head that the
# files call otherwise.
WALKED = ("opt", "bloom", "gptj", "falcon", "gpt_neox")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": ({"num_local_experts": 4}, "MixtralForCausalLM stores its experts one by one"),
    "qwen3_moe": (
        {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "head_dim": 16},
        "Qwen3MoeForCausalLM stores its experts one by one",
    ),
}


@pytest.mark.parametrize("arch", WALKED)
def test_the_walk_sees_what_the_model_computes(arch: str, tiny_model_dir: Callable[..., Path]) -> None:
    directory = tiny_model_dir(arch, **FAMILIES[arch])
    tokens = torch.randint(4, 288, (3, 40))
    walk = BlockWalk(open_checkpoint(directory), tokens)
    first, second = walk.blocks
    walk.load(first)
    walk.advance(first)
    with torch.no_grad():
        model = load_model(directory)
        expected = model(input_ids=tokens, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(torch.cat(walk.hidden), expected, rtol=1e-4, atol=1e-4)
    walk.load(second)
    linears = {
        name: m
        for name, m in walk.model.named_modules()
        if name.startswith(second) and hasattr(m, "in_features")
    }
    assert sum(map(len, walk.input_groups(second, linears))) == len(linears)


@pytest.mark.parametrize("arch", REFUSED)
def test_refused_with_the_reason(arch: str, tiny_model_dir: Callable[..., Path]) -> None:
    changes, message = REFUSED[arch]
    with pytest.raises(ModelError, match=message):
        model_outline(ModelSection(source=str(tiny_model_dir(arch, **changes))))


def test_a_head_that_files_call_otherwise_opens_in_transformers(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_model_dir("gpt_neox"))
    assert "lm_head.weight" in source.names
    assert "embed_out.weight" not in source.names
    write_model(tmp_path / "again", source, {})
    tokens = torch.randint(4, 288, (1, 9))
    models = [
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for directory in (source.directory, tmp_path / "again")
    ]
    with torch.no_grad():
        expected, again = (model(input_ids=tokens).logits for model in models)
        own = load_model(tmp_path / "again")(input_ids=tokens).logits
    assert torch.equal(expected, again)
    assert torch.equal(expected, own)
