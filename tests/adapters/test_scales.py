"""Adapters that train the base's own scales and norms: alone, and beside a low-rank update."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sqft.adapters import (
    SearchSpace,
    SqftConfig,
    attach_adapters,
    codes_digest,
    count_differing_codes,
    extract_sub_adapter,
    merge_adapters,
    merge_norms,
    set_ranks,
)
from sqft.adapters.norm import find_norms
from sqft.errors import AdapterError
from sqft.models import PackedLinear, QuantizedLinear
from sqft.ops import QuantizedWeight
from sqft.sections import AdapterSection

WEIGHTS = "adapter_model.safetensors"
KINDS = ["scales", "scales on latents", "scales without norms", "qa with scales", "qa with both", "sparse"]
SECTIONS: dict[str, dict[str, Any]] = {
    "scales": {"method": "scales"},
    "scales on latents": {"method": "scales"},
    "scales without norms": {"method": "scales", "train_norms": False},
    "qa with scales": {"method": "qa_sparse_peft", "train_scales": True, "ranks": [6, 4]},
    "qa with both": {
        "method": "qa_sparse_peft", "train_scales": True, "train_norms": True, "ranks": [6, 4],
        "target_modules": ["q*_proj", "*up_proj"],
    },
    "sparse": {"method": "sparse_peft", "train_norms": True, "ranks": [6, 4]},
}  # fmt: skip


def pack(model: nn.Module) -> nn.Module:
    """The same model with its quantized linears holding codes alone."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            parent, _, end = name.rpartition(".")
            packed = PackedLinear.pack(layer.codes(), layer.qparams, layer.bias)
            setattr(model.get_submodule(parent), end, packed)
    return model


@pytest.fixture
def base_of(sparse_model: Any, quantized_model: Any) -> Callable[..., nn.Module]:
    def make(kind: str, arch: str = "llama", **changes: Any) -> nn.Module:
        model = (sparse_model if kind == "sparse" else quantized_model)(arch, **changes)
        for norm in find_norms(model).values():
            setattr(norm, "stored_dtype", torch.bfloat16)  # noqa: B010  as `load_trainable` leaves it
        return pack(model) if kind.startswith("scales") and "latents" not in kind else model

    return make


def attach(base: nn.Module, kind: str) -> Any:
    return attach_adapters(base, AdapterSection(**SECTIONS[kind]))


@pytest.fixture
def tuned(base_of: Any, randomize: Any) -> Callable[..., Any]:
    def make(kind: str, arch: str = "llama", **changes: Any) -> Any:
        model = attach(base_of(kind, arch, **changes), kind)
        randomize(model)
        return model

    return make


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind: str, base_of: Any, tokens: Tensor) -> None:
    base = base_of(kind)
    before = logits(base, tokens)
    assert torch.equal(logits(attach(base, kind), tokens), before)


@pytest.mark.parametrize("arch", ["llama", "phi3", "qwen3", "gemma2"])
@pytest.mark.parametrize("kind", ["scales", "qa with both", "sparse"])
def test_the_merged_model_is_the_adapted_one(kind: str, arch: str, tuned: Any, tokens: Tensor) -> None:
    model = tuned(kind, arch)
    adapted = logits(model, tokens)
    assert count_differing_codes(model)[0] == 0
    merged, norms = merge_adapters(model), merge_norms(model)
    assert set(norms) == set(find_norms(model.get_base_model()))
    plain = model.merge_and_unload()
    for name, weight in merged.items():
        layer = plain.get_submodule(name)
        held = layer.quantized_weight() if hasattr(layer, "quantized_weight") else layer.weight
        assert torch.equal(weight.dequantized(), held)
    assert all(torch.equal(norms[name].float(), plain.get_submodule(name).weight) for name in norms)
    assert torch.equal(logits(plain, tokens), adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_unmerge_and_disable(kind: str, tuned: Any, base_of: Any, tokens: Tensor) -> None:
    before = logits(base_of(kind), tokens)
    model = tuned(kind)
    adapted = logits(model, tokens)
    assert not torch.equal(adapted, before)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), before)
    model.merge_adapter()
    assert torch.equal(logits(model, tokens), adapted)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), adapted)
    assert torch.equal(logits(model.unload(), tokens), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_is_served(
    kind: str, low_cpu_mem_usage: bool, tuned: Any, base_of: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = tuned(kind)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    merged, norms = merge_adapters(model), merge_norms(model)
    for key, tensor in stored.items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".")
        if part == "sqft_scale":
            assert tensor.dtype == torch.bfloat16
            weight = merged[name].weight
            assert isinstance(weight, QuantizedWeight)
            assert torch.equal(tensor.float(), weight.qparams.scale)
        elif part == "sqft_norm":
            assert torch.equal(tensor, norms[name])
    if kind == "scales":
        assert {key.rpartition(".")[2] for key in stored} == {"sqft_scale", "sqft_norm"}
    again = PeftModel.from_pretrained(base_of(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert codes_digest(again) == codes_digest(model)
    again.save_pretrained(tmp_path / "again")
    assert all(torch.equal(t, stored[k]) for k, t in load_file(tmp_path / "again" / WEIGHTS).items())


def test_many_tasks_on_one_base(tuned: Any, base_of: Any, tokens: Tensor, tmp_path: Path) -> None:
    base = base_of("scales")
    before = logits(base, tokens)
    held = {name: (b.data_ptr(), b.clone()) for name, b in base.named_buffers() if "packed" in name}
    expected = {}
    for index, name in enumerate(("first", "second")):
        model = tuned("scales")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + index if parameter.requires_grad else 1)
        expected[name] = logits(model, tokens)
        model.save_pretrained(tmp_path / name)
    served = PeftModel.from_pretrained(base, tmp_path / "first", "first")
    served.load_adapter(str(tmp_path / "second"), "second")
    for name in ("first", "second", "first"):
        served.set_adapter(name)
        assert torch.equal(logits(served, tokens), expected[name])
    served.delete_adapter("second")
    assert torch.equal(logits(served.unload(), tokens), before)
    for name, buffer in base.named_buffers():
        if name in held:
            assert buffer.data_ptr() == held[name][0]
            assert torch.equal(buffer, held[name][1])


@pytest.mark.parametrize("change", ["codes", "grid", "norms", "sparsity"])
def test_another_base_is_refused(change: str, tuned: Any, base_of: Any, tmp_path: Path) -> None:
    tuned("scales").save_pretrained(tmp_path)
    other = base_of("scales", **({"sparsity": 0.25} if change == "sparsity" else {}))
    layer = other.model.layers[0].mlp.up_proj
    if change == "codes":
        layer.packed[0, 0] ^= 1
    elif change == "grid":
        layer.scale[0, 0] *= 2
    elif change == "norms":
        other.model.norm.weight.data[0] += 1
    with pytest.raises(AdapterError, match=r"belongs to another (base|grid)") as caught:
        PeftModel.from_pretrained(other, tmp_path)
    assert "\n" not in str(caught.value)


def test_codes_are_a_base_whatever_they_were_rounded_from(tuned: Any, base_of: Any, tmp_path: Path) -> None:
    tuned("scales on latents").save_pretrained(tmp_path)
    PeftModel.from_pretrained(base_of("scales"), tmp_path)


def test_a_base_without_a_grid_is_refused(sparse_model: Any, quantized_model: Any) -> None:
    with pytest.raises(AdapterError, match="quantized base"):
        attach(sparse_model(), "scales")
    with pytest.raises(AdapterError, match="no codes to freeze"):
        attach(quantized_model(latents=False), "scales")
    with pytest.raises(AdapterError, match="base_precision latent"):
        attach(pack(quantized_model()), "qa with scales")


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "not a number"), (-1.0, "zero"), (-2.0, "zero")])
def test_a_scale_that_is_no_positive_number_goes_nowhere(
    value: float, words: str, tuned: Any, tmp_path: Path
) -> None:
    model = tuned("scales")
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_base_model().get_submodule(name)
    layer.sqft_scale["default"].data[2, 1] = value
    for act in (merge_adapters, codes_digest, lambda m: m.merge_and_unload()):
        with pytest.raises(AdapterError, match=f"scales of {name} are {words}"):
            act(model)
    with pytest.raises(AdapterError, match=f"scales of {name} are {words}"):
        model.save_pretrained(tmp_path / "damaged")
    assert not (tmp_path / "damaged" / WEIGHTS).exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.01])
def test_a_damaged_file_is_refused(value: float, tuned: Any, base_of: Any, tmp_path: Path) -> None:
    tuned("scales").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("sqft_scale"))
    for name, tensor in (("scale", tensors[key].clone()), ("missing", None), ("shape", tensors[key][:1])):
        damaged = {k: v for k, v in tensors.items() if k != key} | ({} if tensor is None else {key: tensor})
        if name == "scale":
            damaged[key].view(-1)[3] = value
        save_file({k: v.contiguous() for k, v in damaged.items()}, tmp_path / WEIGHTS)
        with pytest.raises(AdapterError, match="scale") as caught:
            PeftModel.from_pretrained(base_of("scales"), tmp_path)
        assert "\n" not in str(caught.value)


def test_a_norm_that_is_not_finite_is_refused(tuned: Any, base_of: Any, tmp_path: Path) -> None:
    model = tuned("sparse")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("sqft_norm"))
    tensors[key][0] = float("inf")
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="not finite"):
        PeftModel.from_pretrained(base_of("sparse"), tmp_path)
    model.get_base_model().model.norm.sqft_norm["default"].data.fill_(float("nan"))
    with pytest.raises(AdapterError, match="not finite"):
        merge_norms(model)


def test_the_digest_covers_scales_and_norms(tuned: Any) -> None:
    model = tuned("scales")
    digests = {codes_digest(model)}
    layer = model.get_base_model().model.layers[0]
    layer.mlp.up_proj.sqft_scale["default"].data[0, 0] += 0.1
    digests.add(codes_digest(model))
    layer.input_layernorm.sqft_norm["default"].data[0] += 0.1
    digests.add(codes_digest(model))
    assert len(digests) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_trained_gets_a_gradient(kind: str, tuned: Any, tokens: Tensor) -> None:
    model = tuned(kind)
    model.train()
    set_ranks(model, SearchSpace.of(model).maximal())
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("sqft_" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0, name


def test_one_step_against_the_gradient_lowers_the_loss(base_of: Any, tokens: Tensor) -> None:
    model = attach(base_of("scales"), "scales").train()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad.sign()
        assert model(input_ids=tokens, labels=tokens).loss < loss


def test_scales_alone_have_no_ranks(tuned: Any, tmp_path: Path, base_of: Any, tokens: Tensor) -> None:
    model = tuned("scales")
    space = SearchSpace.of(model)
    assert space.groups == {}
    assert space.maximal() == space.median() == space.minimal() == space.ranks_at(0, 3) == {}
    set_ranks(model, {})
    extract_sub_adapter(model, {}, tmp_path / "sub")
    again = PeftModel.from_pretrained(base_of("scales"), tmp_path / "sub")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_sub_adapter_keeps_scales_and_norms(
    tuned: Any, tmp_path: Path, base_of: Any, tokens: Tensor
) -> None:
    model = tuned("qa with both")
    sub_adapter = SearchSpace.of(model).minimal()
    extract_sub_adapter(model, sub_adapter, tmp_path / "sub")
    set_ranks(model, sub_adapter)
    again = PeftModel.from_pretrained(base_of("qa with both"), tmp_path / "sub")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert codes_digest(again) == codes_digest(model)


def test_a_half_as_large_base_in_memory(quantized_model: Any) -> None:
    latent, packed = quantized_model(), pack(quantized_model())
    size = lambda m: sum(b.numel() for n, b in m.named_buffers() if n.endswith(("latent", "packed")))  # noqa: E731
    assert size(latent) == 2 * size(packed)


def test_settings_that_do_not_go_together_are_refused() -> None:
    for settings, words in (
        ({"method": "lora", "train_norms": True}, "lora does not"),
        ({"method": "sparse_peft", "train_scales": True}, "no scales"),
        ({"method": "scales", "train_scales": False}, "trains no linear"),
        ({"method": "qa_sparse_peft", "train_scales": True, "gradient": "lowrank"}, "gradient exact"),
    ):
        with pytest.raises(AdapterError, match=words):
            SqftConfig(**settings)  # type: ignore[arg-type]


def test_the_config_says_what_is_trained(tuned: Any, tmp_path: Path) -> None:
    model = tuned("qa with both")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(name.endswith(("q_proj", "up_proj")) for name in config["target_modules"])
    assert any(name.endswith("down_proj") for name in config["scale_modules"])
    assert "model.norm" in config["norm_modules"]
    assert config["scale_bits"] == 8
    assert set(config["identity"]) == {"base", "mask", "grid", "codes", "norms"}


def test_scales_of_named_linears_only(quantized_model: Any) -> None:
    config = SqftConfig(method="scales", target_modules=["down_proj"], train_norms=False)
    model = get_peft_model(pack(quantized_model()), config)
    assert list(merge_adapters(model)) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
