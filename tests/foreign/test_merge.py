import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from sqft.adapters.lora_files import open_foreign_adapter
from sqft.errors import AdapterError, ExportError, ModelError
from sqft.export import export_model
from sqft.foreign import MergeObserver, merge_foreign
from sqft.models import load_model, read_masks, read_quantized
from tests.foreign.merges import merge
from tests.memory import Watch, anonymous_bytes

MergedDir = Callable[..., Path]
TOKENS = torch.randint(4, 288, (12, 24), generator=torch.Generator().manual_seed(5))


def answer_loss(model: nn.Module) -> float:
    """The loss on a fixed target, which an adapter can learn."""
    with torch.no_grad():
        return float(model(input_ids=TOKENS, labels=TOKENS).loss)


def train_adapter(base_dir: Path, directory: Path, *, steps: int = 25, **options: Any) -> Path:
    torch.manual_seed(0)
    model = load_model(base_dir)
    targets = "all-linear" if "phi3" not in str(base_dir) else ["qkv_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, **options)
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    adapted.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 4}}]
)
def test_adapted_weights_are_those_of_peft(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    base_dir = tiny_model_dir("llama")
    adapter = open_foreign_adapter(train_adapter(base_dir, tmp_path / "adapter", steps=4, **options))
    model = PeftModel.from_pretrained(load_model(base_dir), tmp_path / "adapter").merge_and_unload()
    base = load_model(base_dir)
    assert len(adapter.names) == 14
    for name in adapter.names:
        expected = model.get_submodule(name).weight
        found = adapter.adapted(name, base.get_submodule(name).weight.detach())
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "changes"), [("llama", {}), ("mistral", {"symmetric": False, "sparsity": 0.0}), ("phi3", {})]
)
def test_the_ladder_climbs_and_keeps_grid_and_mask(
    merged_dir: MergedDir, tmp_path: Path, arch: str, changes: dict[str, Any]
) -> None:
    base_dir = merged_dir(arch, **changes)
    adapter_dir = train_adapter(base_dir, tmp_path / "adapter")
    result = merge(
        base_dir, adapter_dir, tmp_path / "out",
        calibration=TOKENS, measure=answer_loss, enough=2.0, least=0.0,
        polish_steps=20,
    )  # fmt: skip
    losses = {rung.name: rung.loss for rung in result.rungs if rung.loss is not None}
    assert list(losses) == ["round", "feedback", "rescale", "polish"]
    assert result.unmerged_loss is not None
    assert result.base_loss is not None
    assert result.unmerged_loss < result.base_loss - 0.1
    assert losses["polish"] < losses["round"]
    assert result.chosen == min(losses, key=lambda name: losses[name])
    assert answer_loss(load_model(tmp_path / "out")) == pytest.approx(losses[result.chosen], abs=1e-5)
    written, masks = read_quantized(tmp_path / "out"), read_masks(base_dir)
    for name, mask in masks.items():
        assert not written[name].dequantize()[~mask].any()
    names = {layer.name for layer in result.erasure}
    for name, weight in read_quantized(base_dir).items():
        if name not in names:
            assert torch.equal(weight.codes, written[name].codes)
    assert not (tmp_path / "out" / "work").exists()
    report = json.loads((tmp_path / "out" / "sqft_merge.json").read_text())
    assert report["chosen"] == result.chosen


def test_enough_ends_the_ladder(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter")
    result = merge(
        merged_dir(), adapter_dir, tmp_path / "out", calibration=TOKENS, measure=answer_loss, enough=0.01
    )
    assert [rung.name for rung in result.rungs] == ["round"]
    before, after = read_quantized(merged_dir()), read_quantized(tmp_path / "out")
    for name, weight in before.items():
        assert torch.equal(weight.qparams.scale, after[name].qparams.scale)


def test_an_update_smaller_than_a_step_is_erased_and_refused(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter", steps=1)
    arguments: dict[str, Any] = {"measure": answer_loss, "rungs": ["round"], "least": 0.9}
    with pytest.raises(ExportError, match=r"the best rung, round, retains .* serve it unmerged"):
        merge(merged_dir(), adapter_dir, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ExportError, match=r"keeps \d\.\d% of the update .* the base would be written"):
        merge(merged_dir(), adapter_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = merge(merged_dir(), adapter_dir, tmp_path / "out", least=0.0)
    assert result.rungs[0].loss is None
    assert all(layer.erased > 0.9 for layer in result.erasure)
    assert all(layer.update_in_steps is not None and layer.update_in_steps < 0.1 for layer in result.erasure)


def test_a_sparse_base_keeps_its_zeros(merged_dir: MergedDir, tmp_path: Path) -> None:
    base_dir = merged_dir(quantized=False)
    adapter_dir = train_adapter(base_dir, tmp_path / "adapter")
    result = merge(
        base_dir, adapter_dir, tmp_path / "out",
        calibration=TOKENS, measure=answer_loss, enough=2.0, least=0.0,
        polish_steps=15,
    )  # fmt: skip
    assert [rung.name for rung in result.rungs] == ["round", "polish"]
    assert 0.3 < result.erasure[0].masked < 0.7
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, mask in read_masks(base_dir).items():
        assert not tensors[f"{name}.weight"][~mask].any()


def test_an_adapter_is_measured_on_the_base_it_was_trained_on(
    tiny_model_dir: Callable[..., Path], merged_dir: MergedDir, tmp_path: Path
) -> None:
    adapter_dir = train_adapter(tiny_model_dir(), tmp_path / "adapter")
    options: dict[str, Any] = {"measure": answer_loss, "rungs": ["round"], "least": -9.0}
    base_dir = merged_dir(sparsity=0.0)
    alone = merge(base_dir, adapter_dir, tmp_path / "alone", **options)
    losses = {}
    for trained_on in (tiny_model_dir(), f"nf4:{tiny_model_dir()}"):
        result = merge(
            base_dir, adapter_dir, tmp_path / "out", trained_on=trained_on, **options
        )  # fmt: skip
        assert result.unmerged_loss == alone.unmerged_loss  # on the base that is merged into, told too
        assert result.trained_on_loss is not None
        assert result.base_loss is not None
        assert result.rungs[0].loss is not None
        gain = result.base_loss - result.trained_on_loss
        assert result.rungs[0].retention == (result.base_loss - result.rungs[0].loss) / gain
        losses[str(trained_on)] = result.trained_on_loss
    expected = PeftModel.from_pretrained(load_model(tiny_model_dir()), adapter_dir)
    assert losses[str(tiny_model_dir())] == pytest.approx(answer_loss(expected), abs=1e-5)
    assert len(set(losses.values())) == 2
    assert alone.trained_on_loss is None
    with pytest.raises(ExportError, match="is there to measure on; give data too"):
        merge(base_dir, adapter_dir, tmp_path / "out", trained_on=tiny_model_dir())


def test_a_gptq_base_gives_an_integer_or_a_16_bit_model(merged_dir: MergedDir, tmp_path: Path) -> None:
    export_model(merged_dir(), "gptq", tmp_path / "gptq")
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter", steps=3)
    merge(tmp_path / "gptq", adapter_dir, tmp_path / "kept", least=0.0)
    for name, weight in read_quantized(merged_dir()).items():
        assert torch.equal(read_quantized(tmp_path / "kept")[name].qparams.scale, weight.qparams.scale)
    result = merge(tmp_path / "gptq", adapter_dir, tmp_path / "dense", dequantize=True)
    assert result.chosen == "round"
    assert not read_quantized(tmp_path / "dense")
    unmerged = PeftModel.from_pretrained(load_model(merged_dir()), adapter_dir)
    assert answer_loss(load_model(tmp_path / "dense")) == pytest.approx(answer_loss(unmerged), abs=2e-2)


def test_what_cannot_be_merged_is_told(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter", steps=1)
    path = adapter_dir / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"peft_type": "SQFT"}, "merge it with the recipe that trained it"),
        ({"peft_type": "IA3"}, "only LORA can be merged"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"bias": "all"}, "trains biases"),
        ({"use_dora": True}, "lacks lora_magnitude_vector"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "sets layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "started by olora, .*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "started by corda, .*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "started by loftq, .*save that base when training"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(AdapterError, match=message):
            merge(merged_dir(), adapter_dir, tmp_path / "out")
    path.write_text(json.dumps(config | {"lora_alpha": 1e40}))
    with pytest.raises(AdapterError, match="would not be finite; its update is too large"):
        merge(merged_dir(), adapter_dir, tmp_path / "out")
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="which the base does not have"):
        merge(merged_dir("phi3"), adapter_dir, tmp_path / "out")
    with pytest.raises(ValidationError, match=r"rungs\.0"):
        merge(merged_dir(), adapter_dir, tmp_path / "out", rungs=["magic"])
    with pytest.raises(ModelError, match="not a model directory"):
        merge(tmp_path, adapter_dir, tmp_path / "out")
    with pytest.raises(AdapterError, match="not a PEFT adapter"):
        merge(merged_dir(), tmp_path, tmp_path / "out")


def test_what_was_found_is_told_before_a_refusal(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter", steps=1)
    told: list[Any] = []

    class Listener(MergeObserver):
        def on_erasure(self, layers: list[Any]) -> None:
            told.append(layers)

        def on_rung(self, rung: Any) -> None:
            told.append(rung)

    with pytest.raises(ExportError, match="would lose the adapter"):
        merge(
            merged_dir(), adapter_dir, tmp_path / "out", measure=answer_loss, rungs=["round"], least=0.9,
            observer=Listener(),
        )  # fmt: skip
    layers, rung = told
    assert len(layers) == 14
    assert rung.name == "round"
    assert rung.retention < 0.9


def test_rungs_without_what_they_need_are_named(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter", steps=1)
    with pytest.raises(ExportError, match=r"feedback, polish: calibration data is needed \(--data\)"):
        merge(merged_dir(), adapter_dir, tmp_path / "out", rungs=["feedback", "polish"])
    result = merge(merged_dir(), adapter_dir, tmp_path / "out", rungs=["round", "polish"], least=0.0)
    assert result.skipped == {"polish": "needs calibration data"}
    dense = merge(
        merged_dir(quantized=False),
        adapter_dir,
        tmp_path / "out",
        calibration=TOKENS,
        rungs=["rescale", "round"],
    )
    assert dense.skipped == {"rescale": "the base has no grid"}
    assert dense.chosen == "round"


def test_the_record_names_base_and_adapter(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter", steps=1)
    merge(merged_dir(), adapter_dir, tmp_path / "out", least=0.0)
    sources = json.loads((tmp_path / "out" / "sqft_merge.json").read_text())["sources"]
    for directory, part, name in (
        (merged_dir(), "base", "model.safetensors"),
        (adapter_dir, "adapter", "adapter_model.safetensors"),
    ):
        assert sources[part][name] == hashlib.sha256((directory / name).read_bytes()).hexdigest()


def test_retention_is_undefined_where_there_was_no_gain(merged_dir: MergedDir, tmp_path: Path) -> None:
    adapter_dir = train_adapter(merged_dir(), tmp_path / "adapter", steps=1)
    losses = iter([1.0, 1.0, 1.5])
    result = merge(
        merged_dir(), adapter_dir, tmp_path / "out", measure=lambda _: next(losses), rungs=["round"]
    )
    assert result.rungs[0].loss == 1.5
    assert result.rungs[0].retention is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_number_of_layers(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base_dir = tiny_model_dir("llama", num_hidden_layers=12, hidden_size=256, intermediate_size=1024)
    model = get_peft_model(load_model(base_dir), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    del model
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
    get_peft_model(load_model(tiny_model_dir()), LoraConfig(**options)).save_pretrained(tmp_path / "small")
    merge(tiny_model_dir(), tmp_path / "small", tmp_path / "warm")  # what is loaded only once
    watch, done, before = Watch(), [], anonymous_bytes()

    class Scales(MergeObserver):
        def on_rung(self, rung: Any) -> None:
            done.append(anonymous_bytes())

    merge_foreign(base_dir, tmp_path / "adapter", tmp_path / "out", observer=Scales(), progress=watch)
    assert len(watch.seen) == 12 * 7
    all_blocks = 12 * 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)  # in float32
    assert max(*watch.seen, *done) - before < all_blocks / 2  # done: the merged model is written
