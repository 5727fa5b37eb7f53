"""Experts that an architecture keeps in one tensor are not compressed, and nobody is told that they are."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from sqft.compression import choose_layers
from sqft.errors import CompressionError
from sqft.evaluation.measurement import zero_share
from sqft.models import load_model, model_outline
from sqft.sections import ModelSection, QuantizeSection, SparsifySection


@pytest.fixture
def experts_dir(tmp_path: Path) -> Path:
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=288, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("section", [SparsifySection, QuantizeSection])
def test_a_model_that_is_mostly_experts_is_refused(
    section: type[SparsifySection | QuantizeSection], experts_dir: Path
) -> None:
    outline = model_outline(ModelSection(source=str(experts_dir)))
    with pytest.raises(
        CompressionError, match=r"8\d% of the weights .* \(model.layers.\d.mlp.experts.gate_up"
    ):
        choose_layers(outline, section())
    named = section(target_modules=["q_proj", "k_proj", "v_proj"])
    assert len(choose_layers(outline, named)) == 6


def test_the_share_of_zeros_counts_experts_too(experts_dir: Path) -> None:
    model = load_model(experts_dir)
    assert zero_share(model) < 0.02  # biases of experts start at 0
    model.model.layers[0].mlp.experts.gate_up_proj.data.zero_()
    model.model.layers[1].mlp.experts.gate_up_proj.data.zero_()
    assert zero_share(model) == pytest.approx(2 / 3 * 0.8, abs=0.07)
