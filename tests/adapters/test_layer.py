import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sqft.adapters import (
    MergedWeight,
    SearchSpace,
    SqftConfig,
    attach_adapters,
    codes_digest,
    count_differing_codes,
    merge_adapters,
    set_ranks,
    set_step,
)
from sqft.adapters.identity import base_weight
from sqft.adapters.space import adapter_layers
from sqft.errors import AdapterError
from sqft.models import load_trainable
from sqft.sections import AdapterSection

METHODS = ["lora", "sparse_peft", "qa_sparse_peft"]
ARCHITECTURES = ["llama", "mistral", "phi3"]


def attach(model: Any, method: str, ranks: tuple[int, ...] = (8, 6, 4), **settings: Any) -> Any:
    return attach_adapters(model, AdapterSection(method=method, ranks=list(ranks), **settings))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing(method: str, make_base: Any, tokens: Tensor) -> None:
    base = make_base(method)
    before = logits(base, tokens)
    assert torch.equal(logits(attach(base, method), tokens), before)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_merged_model_is_the_adapted_model(
    randomize: Any, method: str, arch: str, make_base: Any, tokens: Tensor
) -> None:
    model = attach(make_base(method, arch), method)
    randomize(model)
    set_ranks(model, SearchSpace.of(model).median())
    adapted = logits(model, tokens)
    merged = merge_adapters(model)
    weights = {name: layer.adapted("default").detach() for name, layer in adapter_layers(model).items()}
    for name, weight in merged.items():
        assert torch.equal(weight.dequantized(), weights[name])
        assert torch.equal(weight.dequantized() != 0, weight.mask) or method == "qa_sparse_peft"
        assert not weight.dequantized()[~weight.mask].any()
    plain = model.merge_and_unload()
    if method == "lora":
        torch.testing.assert_close(logits(plain, tokens), adapted, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(logits(plain, tokens), adapted)


def test_merged_16_bit_weights_are_the_trained_ones(
    randomize: Any, sparse_model: Any, tokens: Tensor
) -> None:
    model = attach(sparse_model(dtype=torch.bfloat16), "sparse_peft")
    randomize(model)
    merged = merge_adapters(model)
    for name, layer in adapter_layers(model).items():
        stored = merged[name].weight
        assert isinstance(stored, Tensor)
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored.float(), layer.adapted("default"))
    adapted = logits(model, tokens)
    assert torch.equal(logits(model.merge_and_unload(), tokens), adapted)


def test_storage_dtype_of_a_model_loaded_in_float32(randomize: Any, sparse_model: Any) -> None:
    section = AdapterSection(method="sparse_peft", ranks=[4])
    model = attach_adapters(sparse_model(), section, storage_dtype=torch.bfloat16)
    randomize(model)
    for name, layer in adapter_layers(model).items():
        weight = merge_adapters(model)[name].weight
        assert isinstance(weight, Tensor)
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.float(), layer.adapted("default"))


@pytest.mark.parametrize("method", METHODS)
def test_merge_unmerge_and_disable(randomize: Any, method: str, make_base: Any, tokens: Tensor) -> None:
    base = make_base(method)
    before = logits(base, tokens)
    model = attach(base, method)
    randomize(model)
    adapted = logits(model, tokens)
    assert not torch.allclose(adapted, before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), adapted, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model, tokens), adapted)


def test_lora_does_not_merge_where_it_would_lose_something(sparse_model: Any, quantized_model: Any) -> None:
    with pytest.raises(AdapterError, match="zeros"):
        merge_adapters(attach(sparse_model(), "lora"))
    with pytest.raises(AdapterError, match="quantized"):
        attach(quantized_model(), "lora").merge_and_unload()


def test_lora_runs_on_a_quantized_base(randomize: Any, quantized_model: Any, tokens: Tensor) -> None:
    base = quantized_model()
    before = logits(base, tokens)
    model = attach(base, "lora")
    assert torch.equal(logits(model, tokens), before)
    randomize(model)
    assert not torch.allclose(logits(model, tokens), before)


def test_methods_that_do_not_fit_the_base(sparse_model: Any, quantized_model: Any) -> None:
    with pytest.raises(AdapterError, match="needs a quantized base"):
        attach(sparse_model(), "qa_sparse_peft")
    with pytest.raises(AdapterError, match="leave its grid"):
        attach(quantized_model(), "sparse_peft")
    with pytest.raises(AdapterError, match="no linear layer is called nothing"):
        attach(sparse_model(), "sparse_peft", target_modules=["nothing"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_never_merged(
    method: str, value: float, make_base: Any, randomize: Any, tokens: Tensor
) -> None:
    model = attach(make_base(method), method)
    randomize(model)
    *_, last = adapter_layers(model).values()
    last.sqft_B["default"].data[3, 1] = value
    before = logits(model, tokens)
    for merge in (model.merge_adapter, model.merge_and_unload):
        for safe_merge in (False, True):
            with pytest.raises(AdapterError, match="not finite"):
                merge(safe_merge=safe_merge)
    with pytest.raises(AdapterError, match="not finite"):
        codes_digest(model)
    assert not any(layer.merged_adapters for layer in adapter_layers(model).values())
    assert torch.equal(logits(model, tokens), before) or before.isnan().any()


def test_a_refused_merge_leaves_the_model_as_it_was(
    sparse_model: Any, quantized_model: Any, randomize: Any, tokens: Tensor
) -> None:
    """The first layers could be merged, the last, which is quantized, could not."""
    model, last = sparse_model(sparsity=0.0), "model.layers.1.mlp"
    model.get_submodule(last).down_proj = quantized_model().get_submodule(f"{last}.down_proj")
    model = attach(model, "lora")
    randomize(model)
    before = logits(model, tokens)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match="quantized"):
            merge()
        assert len(adapter_layers(model)) == 10
        assert torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_adapter_for_each_row_is_refused(call: str, make_base: Any, tokens: Tensor) -> None:
    model = attach(make_base("sparse_peft"), "sparse_peft").eval()
    run = model if call == "forward" else model.generate
    with pytest.raises(AdapterError, match="set_adapter"):
        run(input_ids=tokens, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("method", METHODS)
def test_elastic_ranks_that_nobody_draws_do_not_train(method: str, make_base: Any, tokens: Tensor) -> None:
    model = attach(make_base(method), method)
    model.train()
    with pytest.raises(AdapterError, match="RankSampler"):
        model(input_ids=tokens)
    with torch.no_grad():
        model(input_ids=tokens)
    model.eval()(input_ids=tokens)
    model.train()
    set_ranks(model, SearchSpace.of(model).maximal())
    model(input_ids=tokens)


@pytest.mark.parametrize("load_dtype", [torch.float32, torch.bfloat16])
def test_a_16_bit_checkpoint_is_trained_as_it_will_be_saved(
    load_dtype: torch.dtype, tiny_model_dir: Any, randomize: Any, tokens: Tensor, tmp_path: Path
) -> None:
    """Opened in float32, trained, merged and saved in bfloat16 again, it is still the trained model."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=load_dtype)
    model = attach(plain, "sparse_peft")
    assert model.peft_config["default"].storage_dtype == "bfloat16"
    randomize(model)
    trained = logits(model.float(), tokens)
    model.merge_and_unload().to(torch.bfloat16).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again, tokens), trained)


@pytest.mark.parametrize("kind", ["column", "token"])
@pytest.mark.parametrize("method", METHODS)
def test_dropout_touches_the_update_only(
    kind: str, method: str, make_base: Any, randomize: Any, tokens: Tensor
) -> None:
    base = make_base(method)
    before = logits(base, tokens)
    model = attach(base, method, dropout=0.5, dropout_kind=kind)
    model.train()
    set_step(model, 0, 0)
    torch.testing.assert_close(model(input_ids=tokens).logits, before, atol=1e-5, rtol=1e-5)
    randomize(model)
    undropped = logits(model, tokens)
    model.train()
    assert not torch.allclose(model(input_ids=tokens).logits, undropped, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_column_dropout_is_a_function_of_seed_and_step(
    method: str, make_base: Any, randomize: Any, tokens: Tensor
) -> None:
    model = attach(make_base(method), method, (8,), dropout=0.5)
    randomize(model)
    model.train()
    with pytest.raises(AdapterError, match="set_step"):
        model(input_ids=tokens)
    outputs = []
    for seed, step in ((0, 1), (0, 2), (1, 1), (0, 1)):
        set_step(model, seed, step)
        torch.manual_seed(step * 7)
        outputs.append(model(input_ids=tokens).logits)
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("method", METHODS[1:])
def test_gradient_kinds(method: str, make_base: Any, randomize: Any, tokens: Tensor) -> None:
    found: dict[str, list[Tensor]] = {}
    for gradient in ("exact", "lowrank", "hybrid"):
        model = attach(make_base(method), method, gradient=gradient, hybrid_steps=3)
        randomize(model)
        model.train()
        for step in (0, 1, 3) if gradient == "hybrid" else (0,):
            set_step(model, 0, step)
            model.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            found[f"{gradient} {step}"] = [p.grad.clone() for p in model.parameters() if p.requires_grad]

    def equal(first: str, second: str) -> bool:
        return all(torch.equal(a, b) for a, b in zip(found[first], found[second], strict=True))

    assert equal("exact 0", "hybrid 0")
    assert equal("exact 0", "hybrid 3")
    assert equal("lowrank 0", "hybrid 1")
    assert not equal("exact 0", "lowrank 0")


def test_lora_has_no_other_gradient() -> None:
    with pytest.raises(ValueError, match="lowrank and hybrid are for masked updates"):
        AdapterSection(method="lora", gradient="lowrank")
    with pytest.raises(AdapterError, match="no meaning"):
        SqftConfig(method="lora", gradient="lowrank")


@pytest.mark.parametrize("method", METHODS)
def test_sharing_layers_save_their_input_once(method: str, make_base: Any, tokens: Tensor) -> None:
    model = attach(make_base(method), method, (8,), target_modules=["q_proj", "k_proj", "v_proj"])
    model.train()
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(2, 5, 64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer(x)
    inputs = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    assert inputs == {x.data_ptr()}


@pytest.mark.parametrize("method", METHODS)
def test_elastic_ranks_under_gradient_checkpointing(
    randomize: Any, method: str, make_base: Any, tokens: Tensor
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = attach(make_base(method), method)
        randomize(model)
        if checkpointing:
            model.enable_input_require_grads()
            new = "activation_checkpointing_enable"  # transformers 5.17 has the older name only
            getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")()
        model.train()
        set_ranks(model, SearchSpace.of(model).ranks_at(0, 5))
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])
    ranks = {name: layer.active_rank["default"] for name, layer in adapter_layers(model).items()}
    for name, rank in ranks.items():
        grad = gradients[0][f"base_model.model.{name}.sqft_A.default"]
        assert not grad[rank:].any()
        assert grad[:rank].any()


def test_digest_follows_the_merged_codes(randomize: Any, quantized_model: Any) -> None:
    model = attach(quantized_model(), "qa_sparse_peft")
    start = codes_digest(model)
    randomize(model)
    tuned = codes_digest(model)
    assert start != tuned == codes_digest(model)
    set_ranks(model, SearchSpace.of(model).minimal())
    assert codes_digest(model) != tuned


def test_only_the_adapter_trains(make_base: Any) -> None:
    for method in METHODS:
        model = attach(make_base(method), method)
        assert all(("sqft_" in name) == p.requires_grad for name, p in model.named_parameters())
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("latents", [True, False])
def test_merged_weight_of_a_quantized_base_can_be_trained_on(
    latents: bool, randomize: Any, quantized_model: Any, tokens: Tensor
) -> None:
    model = attach(quantized_model(latents=latents), "qa_sparse_peft")
    randomize(model)
    masks = {name: weight.mask for name, weight in merge_adapters(model).items()}
    tuned = logits(model, tokens)
    again = attach(model.merge_and_unload(), "qa_sparse_peft")
    assert torch.equal(logits(again, tokens), tuned)
    merged: dict[str, MergedWeight] = merge_adapters(again)
    found = {name: weight.mask for name, weight in merged.items()}
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


def test_16_bit_base_under_float32_activations(tiny_model_dir: Any, randomize: Any, tokens: Tensor) -> None:
    base = load_trainable(tiny_model_dir("llama"))
    stored = {n: p.dtype for n, p in base.named_parameters()}
    assert stored["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    model = attach(base, "sparse_peft")
    randomize(model)
    adapted = logits(model, tokens)
    assert adapted.dtype == torch.float32
    layer = adapter_layers(model)["model.layers.0.mlp.up_proj"]
    assert base_weight(layer).dtype == torch.bfloat16
    with model.disable_adapter():
        assert not torch.equal(logits(model, tokens), adapted)
    merged = model.merge_and_unload().float()
    assert torch.equal(logits(merged, tokens), adapted)


@pytest.mark.parametrize("method", METHODS[1:])
def test_training_and_merging_agree_in_every_weight(method: str, make_base: Any, randomize: Any) -> None:
    model = attach(make_base(method), method)
    randomize(model)
    set_ranks(model, SearchSpace.of(model).ranks_at(0, 2))
    differing, total = count_differing_codes(model)
    assert differing == 0
    assert total == sum(layer.in_features * layer.out_features for layer in adapter_layers(model).values())


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, make_base: Any, randomize: Any, tokens: Tensor) -> None:
    model = attach(make_base(method), method, (8,))
    randomize(model)
    plain = logits(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()
        loss = model(input_ids=tokens, labels=tokens).loss
        cast = logits(model, tokens)
    loss.backward()
    assert torch.nn.functional.cosine_similarity(plain.flatten(), cast.float().flatten(), dim=0) > 0.99
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_partly_quantized_base_is_named_first(sparse_model: Any, quantized_model: Any) -> None:
    model, name = quantized_model(), "model.layers.1.mlp.down_proj"
    model.get_submodule("model.layers.1.mlp").down_proj = sparse_model().get_submodule(name).bfloat16()
    with pytest.raises(AdapterError, match=f"needs a quantized base, and {name} is not"):
        attach(model, "qa_sparse_peft", target_modules=["down_proj"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_without_a_stored_mask_stray_zeros_may_change(
    dtype: str, tiny_model_dir: Any, randomize: Any, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model_dir("llama", dtype=dtype), tmp_path / "m")
    name = "model.layers.0.self_attn.q_proj"
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{name}.weight"][2, 5:8] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    digests = []
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for base in (load_trainable(directory), plain):
        model = attach(base, "sparse_peft")
        randomize(model)
        merged = merge_adapters(model)[name]
        assert merged.mask.all()
        assert isinstance(merged.weight, Tensor)
        assert (merged.weight[2, 5:8].abs() > 1e-4).all()
        digests.append((codes_digest(model), model.peft_config["default"].identity))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_that_arrives_sparse_keeps_its_zeros(
    dtype: str, tiny_model_dir: Any, randomize: Any, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model_dir("llama", dtype=dtype), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensor[torch.rand(tensor.shape) < 0.5] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = attach(load_trainable(directory), "sparse_peft")
    randomize(model)
    for name, merged in merge_adapters(model).items():
        assert torch.equal(merged.mask, tensors[f"{name}.weight"] != 0)
        assert torch.equal(merged.dequantized() != 0, merged.mask)


@pytest.mark.parametrize("method", ["sparse_peft", "qa_sparse_peft"])
def test_what_is_evaluated_beside_a_fast_kernel_is_what_a_merge_writes(
    randomize: Any, method: str, make_base: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(make_base(method), method, kernels="triton")
    randomize(model)
    monkeypatch.setattr("sqft.adapters.layer.adapted_linear", None)  # the training layer is not asked
    adapted = logits(model, tokens)
    assert torch.equal(adapted, logits(model.merge_and_unload(), tokens))
