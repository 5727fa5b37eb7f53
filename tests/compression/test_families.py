"""Architectures that differ from Llama before or between their blocks, and those that are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.families import FAMILIES
from transformers import AutoModelForCausalLM

from sqft.compression import choose_layers, quantize_model
from sqft.compression.walk import BlockWalk
from sqft.errors import CompressionError, ModelError
from sqft.models import load_model, model_outline, open_checkpoint, outline_skeleton
from sqft.models.experts import show_every_token
from sqft.models.writer import CheckpointWriter, write_model
from sqft.runtimes.hf import run_model, run_transformers
from sqft.sections import ModelSection, QuantizeSection, SparsifySection

# Positions in an embedding of their own, a norm before the blocks, blocks that return tuples, a head that the
# files call otherwise.
WALKED = ("opt", "bloom", "gptj", "falcon", "gpt_neox")
MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dots1": (
        {
            "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 64,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
        },
        "Dots1ForCausalLM stores its experts one by one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("arch", [*WALKED, *MIXTURES])
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


@pytest.mark.parametrize("arch", MIXTURES)
def test_experts_by_themselves_compute_what_transformers_computes(
    arch: str, tiny_model_dir: Callable[..., Path]
) -> None:
    directory = tiny_model_dir(arch, **FAMILIES[arch])
    tokens = torch.randint(4, 288, (2, 20))
    model = load_model(directory)
    assert sum(".experts.3." in name for name, _ in model.named_parameters()) == 2 * 3
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        show_every_token(model)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_experts_on_int4_open_in_transformers_exactly(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_model_dir("mixtral", **FAMILIES["mixtral"]))
    section = QuantizeSection(method="rtn", group_size=32)
    writer = CheckpointWriter(tmp_path / "int4", source)
    quantize_model(source, None, section, None, writer)
    writer.close()
    items = [[5, 9, 30, 7, 200]]
    own = run_model(load_model(tmp_path / "int4"), items)
    assert (run_transformers(tmp_path / "int4", items) - own).abs().max() <= 1e-5 * own.abs().max()
    with pytest.raises(CompressionError, match=r"set quantize\.symmetric: true"):
        choose_layers(outline_skeleton(source.skeleton()), section.model_copy(update={"symmetric": False}))


@pytest.mark.parametrize("arch", REFUSED)
def test_refused_with_the_reason(arch: str, tiny_model_dir: Callable[..., Path]) -> None:
    changes, message = REFUSED[arch]
    with pytest.raises(ModelError, match=message):
        model_outline(ModelSection(source=str(tiny_model_dir(arch, **changes))))


def test_linears_with_a_forward_of_their_own_are_not_quantized(tiny_model_dir: Callable[..., Path]) -> None:
    outline = model_outline(ModelSection(source=str(tiny_model_dir("falcon", **FAMILIES["falcon"]))))
    assert choose_layers(outline, SparsifySection(sparsity=0.5))
    with pytest.raises(CompressionError, match="cannot run from codes; leave quantize out"):
        choose_layers(outline, QuantizeSection(group_size=32))


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
