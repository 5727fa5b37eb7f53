"""Adapters of PEFT: what is taken is what PEFT merges, and what would merge wrongly is told."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sqft.errors import AdapterError
from sqft.export.foreign_adapter import open_foreign_adapter
from sqft.models import load_model

ModelDir = Callable[..., Path]
MergedDir = Callable[..., Path]


def write_adapter(base_dir: Path, directory: Path, targets: list[str], **options: object) -> Path:
    """An untrained adapter with an update that is not 0."""
    model = get_peft_model(
        load_model(base_dir), LoraConfig(r=8, lora_alpha=16, target_modules=targets, **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not options.get("init_lora_weights"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_start_is_taken(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    base_dir = tiny_model_dir()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(load_model(base_dir), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = "pissa"
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1.1)
    model.save_pretrained(tmp_path / "wrong")
    with pytest.raises(AdapterError, match="started by pissa"):
        open_foreign_adapter(tmp_path / "wrong")
    model.save_pretrained(
        tmp_path / "right", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    base = load_model(base_dir).model.layers[0].self_attn.q_proj.weight.detach()
    found = open_foreign_adapter(tmp_path / "right").adapted("model.layers.0.self_attn.q_proj", base)
    expected = layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
