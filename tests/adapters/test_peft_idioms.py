"""What a user of PEFT expects of any method; PEFT's own suite (`make peft-suite`) asks for more of it."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from sqft.adapters import SqftConfig, codes_digest, merge_adapters
from sqft.errors import AdapterError


def in_16_bits(model: Any) -> Any:
    model.config.dtype = torch.bfloat16
    for layer in model.modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = torch.bfloat16
    return model.to(torch.bfloat16)


def two_layers() -> nn.ModuleDict:
    return nn.ModuleDict({"first": nn.Linear(8, 16), "second": nn.Linear(16, 4)})


def test_a_model_without_repeated_blocks_may_be_adapted() -> None:
    tuned = get_peft_model(two_layers(), SqftConfig(method="lora", ranks=[2], target_modules=["second"]))
    assert [name for name, p in tuned.named_parameters() if p.requires_grad] == [
        f"base_model.model.second.sqft_{part}.default" for part in "AB"
    ]
    with pytest.raises(AdapterError, match="no linear layer is called third; there are: first, second"):
        get_peft_model(two_layers(), SqftConfig(method="lora", ranks=[2], target_modules=["third"]))


def test_layers_to_transform_names_blocks_by_number(make_base: Any) -> None:
    settings = SqftConfig(method="lora", ranks=[2], layers_to_transform=1)
    model = get_peft_model(make_base("lora"), settings)
    assert {name.split(".")[2] for name in merge_adapters(model)} == {"1"}
    assert settings.layers_to_transform == 1
    assert model.peft_config["default"].layers_to_transform is None  # its targets are full names
    with pytest.raises(AdapterError, match="leaves no layer to adapt"):
        get_peft_model(make_base("lora"), SqftConfig(method="lora", ranks=[2], layers_to_transform=[7]))


def test_layers_to_transform_holds_for_scales_and_norms(make_base: Any) -> None:
    settings = SqftConfig(method="scales", layers_to_transform=[0])
    model = get_peft_model(make_base("qa_sparse_peft"), settings)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {".layers.0." in name for name in trained} == {True}
    assert {"sqft_scale", "sqft_norm"} == {name.split(".")[-2] for name in trained}


def test_what_peft_alone_does_for_lora_is_refused_as_peft_refuses_it(make_base: Any, tmp_path: Any) -> None:
    model = get_peft_model(make_base("lora"), SqftConfig(method="lora", ranks=[2]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only supports LORA but SQFT was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")


@pytest.mark.parametrize("method", ["sparse_peft", "qa_sparse_peft", "scales"])
def test_init_weights_false_starts_with_a_change(method: str, make_base: Any, tokens: Tensor) -> None:
    base = make_base("sparse_peft" if method == "sparse_peft" else "qa_sparse_peft").eval()
    with torch.no_grad():
        expected = base(input_ids=tokens).logits
        ranks: dict[str, Any] = {} if method == "scales" else {"ranks": [8]}
        model = get_peft_model(base, SqftConfig(method=method, init_weights=False, **ranks)).eval()
        found = model(input_ids=tokens).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens).logits, expected)
    assert not torch.allclose(found, expected)
    assert torch.equal(model.merge_and_unload()(input_ids=tokens).logits, found)


@pytest.mark.parametrize("method", ["sparse_peft", "qa_sparse_peft"])
def test_an_adapter_in_16_bits_is_computed_in_float32(
    method: str, make_base: Any, tokens: Tensor, tmp_path: Any
) -> None:
    settings = SqftConfig(method=method, ranks=[4], init_weights=False)
    model = get_peft_model(in_16_bits(make_base(method)), settings, autocast_adapter_dtype=False)
    parts = [p for name, p in model.named_parameters() if "sqft_" in name]
    assert {p.dtype for p in parts} == {torch.bfloat16}
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert {p.grad.dtype for p in parts if p.grad is not None} == {torch.bfloat16}
    assert all(float(p.grad.abs().sum()) > 0 for p in parts if p.grad is not None)
    digest = codes_digest(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(in_16_bits(make_base(method)), tmp_path, autocast_adapter_dtype=False)
    assert codes_digest(again) == digest
    wide = PeftModel.from_pretrained(in_16_bits(make_base(method)), tmp_path)
    assert {p.dtype for name, p in wide.named_parameters() if "sqft_" in name} == {torch.float32}
    for name, merged in merge_adapters(wide).items():
        assert torch.equal(merged.dequantized(), merge_adapters(again)[name].dequantized())
