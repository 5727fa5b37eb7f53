import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from sqft.adapters import (
    SearchSpace,
    SqftConfig,
    attach_adapters,
    base_identity,
    codes_digest,
    extract_sub_adapter,
    set_ranks,
)
from sqft.adapters.identity import base_codes, base_qparams, base_weight
from sqft.adapters.space import adapter_layers
from sqft.errors import AdapterError
from sqft.ops import dequantize
from sqft.sections import AdapterSection

METHODS = ["lora", "sparse_peft", "qa_sparse_peft"]


def attach(model: Any, method: str, **settings: Any) -> Any:
    return attach_adapters(model, AdapterSection(method=method, ranks=[8, 6, 4], alpha=12, **settings))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.fixture
def tuned(make_base: Any, randomize: Any) -> Callable[..., Any]:
    def make(method: str) -> Any:
        model = attach(make_base(method), method)
        randomize(model)
        return model

    return make


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip(
    method: str, low_cpu_mem_usage: bool, tuned: Any, make_base: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = tuned(method)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert all(name.endswith((".sqft_A", ".sqft_B")) for name in names)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "SQFT"
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    assert set(config["identity"]) == {"base", "mask", "grid"}
    again = PeftModel.from_pretrained(make_base(method), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again, tokens), expected)
    assert SearchSpace.of(again) == SearchSpace.of(model)


@pytest.mark.parametrize("method", METHODS)
def test_another_base_is_refused(method: str, tuned: Any, make_base: Any, tmp_path: Path) -> None:
    tuned(method).save_pretrained(tmp_path)
    other = make_base(method, sparsity=0.25)
    with pytest.raises(AdapterError, match="belongs to another") as caught:
        PeftModel.from_pretrained(other, tmp_path)
    assert "\n" not in str(caught.value)


def test_another_grid_is_refused(tuned: Any, quantized_model: Any, tmp_path: Path) -> None:
    tuned("qa_sparse_peft").save_pretrained(tmp_path)
    model = quantized_model()
    model.model.layers[0].mlp.up_proj.scale *= 2
    with pytest.raises(AdapterError, match="another"):
        PeftModel.from_pretrained(model, tmp_path)


def test_a_given_identity_is_checked(sparse_model: Any) -> None:
    section = AdapterSection(method="sparse_peft", ranks=[4])
    identity = base_identity(sparse_model())
    attach_adapters(sparse_model(), section, identity)
    with pytest.raises(AdapterError, match="another mask"):
        attach_adapters(sparse_model(), section, identity | {"mask": "0" * 64})


def test_identity_does_not_depend_on_the_load_dtype(sparse_model: Any) -> None:
    model = sparse_model(dtype=torch.bfloat16)
    before = base_identity(model)
    assert base_identity(model.float()) == before
    assert before["grid"] == "none"


def test_damaged_identity_names_a_missing_module(sparse_model: Any, tuned: Any, tmp_path: Path) -> None:
    tuned("sparse_peft").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="no linear layer"):
        PeftModel.from_pretrained(sparse_model("phi3"), tmp_path)


def test_peft_without_sqft_refuses(tuned: Any, tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    adapters = [tmp_path / method for method in METHODS[1:]]
    for adapter in adapters:
        tuned(adapter.name).save_pretrained(adapter)
    code = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "for adapter in sys.argv[2:]:\n"
        "    try:\n        PeftModel.from_pretrained(model, adapter); print('opened')\n"
        "    except (KeyError, ValueError) as error:\n        print('refused', 'SQFT' in str(error))\n"
    )
    command = [sys.executable, "-c", code, str(tiny_model_dir("llama")), *map(str, adapters)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:-1] == ["refused True"] * len(adapters), done.stderr


def test_lora_sub_adapter_is_stock_peft(
    tuned: Any, tokens: Tensor, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    model = tuned("lora")
    space = SearchSpace.of(model)
    sub_adapter = space.ranks_at(0, 1)
    assert len(set(sub_adapter.values())) > 1
    extract_sub_adapter(model, sub_adapter, tmp_path / "sub")
    config = json.loads((tmp_path / "sub" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert all(
        ".lora_A.weight" in n or ".lora_B.weight" in n
        for n in load_file(tmp_path / "sub" / "adapter_model.safetensors")
    )
    set_ranks(model, sub_adapter)
    torch.save(logits(model, tokens), tmp_path / "expected.pt")
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (
        "import sys, torch; from pathlib import Path; from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM; torch.set_num_threads(1)\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2] + '/sub').eval()\n"
        "tokens = torch.load(sys.argv[2] + '/tokens.pt')\n"
        "with torch.no_grad(): found = model(input_ids=tokens).logits\n"
        "assert 'sqft' not in sys.modules\n"
        "print((found - torch.load(sys.argv[2] + '/expected.pt')).abs().max().item())\n"
    )
    # The base of `tuned("lora")` is the unpruned tiny model, rewritten so that no weight is 0.
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-c",
        code,
        str(tiny_model_dir("llama")),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-5


@pytest.mark.parametrize("method", METHODS[1:])
def test_masked_sub_adapter_keeps_the_type(
    method: str, tuned: Any, make_base: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = tuned(method)
    sub_adapter = SearchSpace.of(model).ranks_at(0, 1)
    extract_sub_adapter(model, sub_adapter, tmp_path / "sub")
    set_ranks(model, sub_adapter)
    again = PeftModel.from_pretrained(make_base(method), tmp_path / "sub")
    assert again.peft_config["default"].peft_type == "SQFT"
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert codes_digest(again) == codes_digest(model)
    assert SearchSpace.of(again).groups == {}  # nothing is left to choose
    extract_sub_adapter(again, {}, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sub", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys())


@pytest.mark.parametrize("method", METHODS)
def test_a_group_may_be_left_out(
    method: str, make_base: Any, randomize: Any, tokens: Tensor, tmp_path: Path
) -> None:
    """Rank 0 leaves the base's weights as they are, has no gradient, and stays so when it is extracted."""
    model = attach_adapters(make_base(method), AdapterSection(method=method, ranks=[4, 0], alpha=12))
    randomize(model)
    space = SearchSpace.of(model)
    assert space.median() == space.maximal()
    group, left_out = next(iter(space.groups.items()))
    sub_adapter = space.maximal() | {group: 0}
    set_ranks(model, sub_adapter)
    layers = adapter_layers(model)
    expected = model.eval()(input_ids=tokens).logits
    expected.logsumexp(-1).sum().backward()
    for name, layer in layers.items():
        grid = base_qparams(layer)
        base = base_weight(layer).float() if grid is None else dequantize(base_codes(layer), grid)
        same = torch.equal(layer.trained_weight(), base)
        assert same == (name in left_out)
        assert bool(layer.sqft_A["default"].grad.any()) == (name not in left_out)
    extract_sub_adapter(model, sub_adapter, tmp_path / "sub")
    config = json.loads((tmp_path / "sub" / "adapter_config.json").read_text())
    if method == "lora":
        assert set(config["target_modules"]) == set(layers) - set(left_out)
    again = PeftModel.from_pretrained(make_base(method), tmp_path / "sub")
    torch.testing.assert_close(logits(again, tokens), expected.detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match="rank 0 everywhere"):
        extract_sub_adapter(model, space.minimal(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_configuration_is_not_changed_by_its_use(sparse_model: Any) -> None:
    config = SqftConfig(method="sparse_peft", ranks=[4])
    for sparsity in (0.5, 0.25):
        model = get_peft_model(sparse_model(sparsity=sparsity), config)
        assert model.peft_config["default"].identity
        assert (config.identity, config.target_modules, config.storage_dtype) == ({}, None, None)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_added_while_another_is_merged(
    method: str, tuned: Any, make_base: Any, tokens: Tensor, tmp_path: Path
) -> None:
    tuned(method).save_pretrained(tmp_path / "first")
    model = tuned(method)
    adapted = logits(model, tokens)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.load_adapter(tmp_path / "first", "loaded")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.add_adapter("added", SqftConfig(method=method, ranks=[4]))
    model.save_pretrained(tmp_path)
    model.set_adapter("loaded")
    assert torch.equal(logits(model, tokens), adapted)
    model.set_adapter("added")
    assert torch.equal(logits(PeftModel.from_pretrained(make_base(method), tmp_path / "added"), tokens),
                       logits(model, tokens))  # fmt: skip


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_head_of_a_classifier_is_trained_and_saved(
    task: str, tiny_model_dir: Callable[..., Path], tokens: Tensor, tmp_path: Path
) -> None:
    classes = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}

    def base() -> Any:
        torch.manual_seed(0)
        return classes[task].from_pretrained(tiny_model_dir("llama"), num_labels=3, dtype=torch.float32)

    model = get_peft_model(base(), SqftConfig(method="sparse_peft", ranks=[4], task_type=task))
    heads = [parameter for name, parameter in model.named_parameters() if "score.modules_to_save" in name]
    assert heads
    assert all(parameter.requires_grad for parameter in heads)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "adapter"), tokens), expected)
    extract_sub_adapter(model, SearchSpace.of(model).maximal(), tmp_path / "sub")
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "sub"), tokens), expected)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = classes[task].from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(again, tokens), expected)


def test_transformers_loads_and_deletes_an_adapter(
    tuned: Any, sparse_model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = tuned("sparse_peft")
    expected = logits(model, tokens)
    assert model.peft_config["default"].peft_type.value == "SQFT"
    model.save_pretrained(tmp_path)
    plain = sparse_model()
    before = logits(plain, tokens)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain, tokens), expected)
    plain.disable_adapters()
    assert torch.equal(logits(plain, tokens), before)
    plain.enable_adapters()
    plain.delete_adapter("default")
    assert torch.equal(logits(plain, tokens), before)


def test_config_is_checked() -> None:
    with pytest.raises(AdapterError, match="method 'x'"):
        SqftConfig(method="x")
    with pytest.raises(AdapterError, match="ranks"):
        SqftConfig(ranks=[0])
    assert SqftConfig(ranks=[4, 8, 4], alpha=16).scaling == 2


@pytest.mark.parametrize("method", METHODS)
def test_two_adapters_on_one_base(
    method: str, tuned: Any, make_base: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = tuned(method)
    first = logits(model, tokens)
    model.save_pretrained(tmp_path)
    model = attach(make_base(method), method)
    untrained = logits(model, tokens)
    model.load_adapter(tmp_path, "second")
    assert torch.equal(logits(model, tokens), untrained)
    model.set_adapter("second")
    assert torch.equal(logits(model, tokens), first)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="one at a time"):
        logits(model, tokens)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model, tokens), first)
