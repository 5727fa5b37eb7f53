"""Blocks and layers kept dense by pattern."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.compression.tiny_runs import quantize, sparsify, tokens
from transformers import AutoModelForCausalLM

from sqft.compression import sparsify as sparsifying
from sqft.compression.budget import outlier_offsets
from sqft.errors import ModelError
from sqft.models import load_model, read_masks, read_quantized

Maker = Callable[..., Path]


def test_a_block_is_kept_dense_by_pattern(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama")
    sparsify(directory, tmp_path / "sparse", skip_modules=["layers.0.*"])
    masks = read_masks(tmp_path / "sparse")
    assert len(masks) == 7
    assert all(name.startswith("model.layers.1.") for name in masks)
    quantize(directory, tmp_path / "q", masks, skip_modules=["model.layers.0.*"])
    assert read_quantized(tmp_path / "q").keys() == masks.keys()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    ours = load_model(tmp_path / "q")
    assert torch.equal(theirs(tokens(2)).logits, ours(tokens(2)).logits)
    dense = load_model(directory).model.layers[0].state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in ours.model.layers[0].state_dict().items())


def test_patterns_do_not_split_what_runtimes_fuse(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama")
    for skip in (["q_*"], ["layers.0.self_attn.[qk]_proj"], ["up_*"]):
        with pytest.raises(ModelError, match="runtimes fuse"):
            quantize(directory, tmp_path / "no", skip_modules=skip)
    quantize(directory, tmp_path / "q", skip_modules=["self_attn.*"], method="rtn")
    assert {name.split(".")[3] for name in read_quantized(tmp_path / "q")} == {"mlp"}


def test_a_block_with_nothing_chosen_does_not_squeeze_the_others(
    tiny_model_dir: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    offsets = outlier_offsets
    monkeypatch.setattr(
        sparsifying,
        "outlier_offsets",
        lambda ratios, spread: (seen.append(ratios), offsets(ratios, spread))[1],
    )
    directory = tiny_model_dir("llama", num_hidden_layers=3)
    sparsify(directory, tmp_path / "out", budget="owl", skip_modules=["layers.1.*"])
    assert len(seen[0]) == 2
    assert min(seen[0]) > 0
    zeros = {}
    for index in (0, 2):
        inside = [
            m for n, m in read_masks(tmp_path / "out").items() if n.startswith(f"model.layers.{index}.")
        ]
        zeros[index] = sum(int((~m).sum()) for m in inside) / sum(m.numel() for m in inside)
    assert abs(zeros[0] - zeros[2]) == pytest.approx(0.16, abs=0.001)  # the whole of the spread
    assert zeros[0] + zeros[2] == pytest.approx(1.0, abs=0.001)
