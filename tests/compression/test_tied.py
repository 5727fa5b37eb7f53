"""A model whose output head is its embedding."""

from collections.abc import Callable
from pathlib import Path

import torch
from tests.compression.tiny_runs import quantize, sparsify, tokens
from transformers import AutoModelForCausalLM

from sqft.models import load_model, open_checkpoint, read_masks


def test_tied_embeddings_stay_tied_and_untouched(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny_model_dir("llama", tie_word_embeddings=True)
    embedding = load_model(directory).model.embed_tokens.weight
    sparsify(directory, tmp_path / "sparse")
    quantize(directory, tmp_path / "q", read_masks(tmp_path / "sparse"))
    for out in (tmp_path / "sparse", tmp_path / "q"):
        assert "lm_head.weight" not in open_checkpoint(out).names
        ours = load_model(out)
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
        assert torch.equal(ours.lm_head.weight, embedding)
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
        assert torch.equal(theirs.lm_head.weight, embedding)
        assert torch.equal(theirs(tokens(2)).logits, ours(tokens(2)).logits)
