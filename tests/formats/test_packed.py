"""Packed directories: every file comes back bit for bit, and damage is told in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sqft.artifacts import PACK_RECORD, digest_files, seal
from sqft.errors import ExportError, ModelError, SqftError
from sqft.formats import packed as packed_format
from sqft.formats.packed import check_packed, pack_model, unpack_model
from sqft.models import load_model, open_checkpoint, read_masks, read_quantized
from tests.merged_models import write_merge

Maker = Callable[..., Path]


@pytest.fixture
def merged(tiny_model_dir: Maker, tmp_path: Path) -> Callable[..., Path]:
    """A merged model, with a file beside the weights that sqft knows nothing of."""

    def make(arch: str = "llama", **changes: Any) -> Path:
        directory = write_merge(tiny_model_dir(arch), tmp_path / "made", **changes).merged
        (directory / "notes").mkdir()
        (directory / "notes" / "a.txt").write_text("kept")
        return directory

    return make


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"pattern": "16:32 window 2"}),
        ("llama", {"pattern": "4:16"}),
        ("mistral", {"symmetric": False}),
        ("phi3", {"sparsity": 0.6}),
        ("llama", {"bits": 3}),
        ("llama", {"bits": 8, "sparsity": 0.3}),
        ("llama", {"stored_masks": True, "group_size": 64}),
    ],
)
def test_a_round_trip(
    merged: Callable[..., Path], tmp_path: Path, arch: str, changes: dict[str, Any]
) -> None:
    directory = merged(arch, **changes)
    result = pack_model(directory, tmp_path / "packed")
    assert result.bytes_after < result.bytes_before
    packed = tmp_path / "packed"
    assert not list(packed.glob("model*.safetensors"))
    assert not (packed / "sqft_masks.safetensors").exists()
    check_packed(packed)
    unpack_model(packed, tmp_path / "back")
    assert digest_files(tmp_path / "back") == digest_files(directory)

    # It is a model directory like any other.
    before, after = read_quantized(directory), read_quantized(packed)
    for name, weight in before.items():
        assert torch.equal(weight.codes, after[name].codes)
        assert torch.equal(weight.qparams.scale, after[name].qparams.scale)
        assert torch.equal(weight.qparams.zero_point, after[name].qparams.zero_point)
    masks = read_masks(directory)
    assert masks.keys() == read_masks(packed).keys()
    assert all(torch.equal(mask, read_masks(packed)[name]) for name, mask in masks.items())
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(load_model(directory)(ids).logits, load_model(packed)(ids).logits)


def test_shards_and_layers_that_stay_dense(merged: Callable[..., Path], tmp_path: Path) -> None:
    directory = merged()
    tensors = load_file(directory / "model.safetensors")
    names, end = sorted(tensors), len(tensors) // 2
    weight_map: dict[str, str] = {}
    for number, part in enumerate([names[:end], names[end:]], 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "sqft_masks.safetensors").unlink()
    dense = open_checkpoint(directory)
    before = dense.quantized("model.layers.1.mlp.up_proj").codes
    pack_model(directory, tmp_path / "packed")
    assert torch.equal(
        open_checkpoint(tmp_path / "packed").quantized("model.layers.1.mlp.up_proj").codes, before
    )
    unpack_model(tmp_path / "packed", tmp_path / "back")
    assert digest_files(tmp_path / "back") == digest_files(directory)


def test_the_size_is_that_of_masks_and_kept_codes(merged: Callable[..., Path], tmp_path: Path) -> None:
    directory = merged(pattern="16:32 window 2")
    pack_model(directory, tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "packed.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "sqft_packed": "1"}
        name = "model.layers.0.mlp.up_proj"
        mask, kept = file.get_tensor(f"{name}.weight_mask"), file.get_tensor(f"{name}.weight_kept")
    rows, columns = open_checkpoint(directory).linears[name]
    assert mask.numel() + kept.numel() == rows * columns * 3 // 8


def test_what_cannot_be_packed_is_refused(merged: Callable[..., Path], tmp_path: Path) -> None:
    directory = merged()
    pack_model(directory, tmp_path / "packed")
    with pytest.raises(ExportError, match="packed already"):
        pack_model(tmp_path / "packed", tmp_path / "again")
    with pytest.raises(ExportError, match="would delete"):
        pack_model(directory, directory)
    with pytest.raises(ModelError, match="not packed: it has no sqft_packed"):
        unpack_model(directory, tmp_path / "no")
    with pytest.raises(ExportError, match="which no export or merge of sqft wrote"):
        unpack_model(tmp_path / "packed", directory)
    shutil.rmtree(tmp_path / "made")
    with pytest.raises(ExportError, match="no integer weights"):
        pack_model(merged(quantized=False), tmp_path / "no")
    shutil.rmtree(tmp_path / "made")
    with pytest.raises(ExportError, match="sparse enough"):
        pack_model(merged(sparsity=0.0), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / "no.partial").exists() or not (tmp_path / "no.partial" / PACK_RECORD).exists()


def test_a_pruned_weight_that_is_not_zero_is_told(merged: Callable[..., Path], tmp_path: Path) -> None:
    directory = merged()
    path = directory / "sqft_masks.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    masks = {name: mask ^ 255 for name, mask in load_file(path).items()}
    save_file(masks, path, metadata=metadata)
    with pytest.raises(ExportError, match="a pruned weight of model"):
        pack_model(directory, tmp_path / "packed")


def test_packing_notices_what_would_not_come_back(
    merged: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file of another writer, with bits where ours has none, or a defect of our own."""
    honest = packed_format.pack_codes  # type: ignore[attr-defined]

    def change(name: str, *rest: Any) -> dict[str, torch.Tensor]:
        tensors = honest(name, *rest)
        if name.endswith("layers.1.mlp.up_proj"):
            tensors[f"{name}.weight_kept"][-1] ^= 1
        return tensors

    monkeypatch.setattr(packed_format, "pack_codes", change)
    with pytest.raises(ExportError, match="would not come back bit for bit"):
        pack_model(merged(), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.fixture
def packed(merged: Callable[..., Path], tmp_path: Path) -> Path:
    pack_model(merged(pattern="16:32 window 2"), tmp_path / "packed")
    return tmp_path / "packed"


def test_versions_to_come_are_told(packed: Path, tmp_path: Path) -> None:
    path = packed / PACK_RECORD
    record = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    path.write_text(json.dumps(seal(record | {"version": 2})))
    with pytest.raises(ModelError, match="packed in version 2 of the format, this sqft reads version 1"):
        unpack_model(packed, tmp_path / "back")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["version"] = 3
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="version 3"):
        open_checkpoint(packed)


def test_records_that_point_elsewhere_are_refused(packed: Path, tmp_path: Path) -> None:
    path = packed / PACK_RECORD
    record = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    outside = tmp_path / "outside.json"
    for name in ("../outside.json", str(outside), "a/../../outside.json"):
        changed = record | {"originals": record["originals"] | {name: record["originals"]["config.json"]}}
        path.write_text(json.dumps(seal(changed)))
        with pytest.raises(ModelError, match="names files elsewhere"):
            unpack_model(packed, tmp_path / "back")
        assert not outside.exists()


@pytest.mark.parametrize("file", ["packed.safetensors", "config.json", PACK_RECORD, "tokenizer.json"])
def test_damage_is_told_in_one_line(packed: Path, tmp_path: Path, file: str) -> None:
    """Truncation at many places and single bits, in every kind of file: never a traceback, never a result."""
    path = packed / file
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(len(whole))
    places = torch.randint(0, len(whole), (12,), generator=generator).tolist()
    damaged = [whole[:place] for place in (0, 4, *places[:4])]
    for place in (0, 3, 9, *places):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        damaged.append(bytes(changed))
    for content in [*damaged, b"", whole + b"\0"]:
        path.write_bytes(content)
        with pytest.raises(SqftError) as error:
            unpack_model(packed, tmp_path / "back")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "back").exists()
    path.unlink()
    with pytest.raises(SqftError):
        unpack_model(packed, tmp_path / "back")


def test_what_was_hashed_anew_after_a_change_does_not_come_back_as_the_original(
    packed: Path, tmp_path: Path
) -> None:
    """Random bytes in the weights, with digests that say nothing happened: the original's digest tells."""
    path, record = packed / "packed.safetensors", packed / PACK_RECORD
    whole = path.read_bytes()
    values = {k: v for k, v in json.loads(record.read_text()).items() if k != "sha256"}
    start = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        changed = bytearray(whole)
        for place in torch.randint(start, len(whole), (3,), generator=generator).tolist():
            changed[place] ^= 0x55
        path.write_bytes(changed)
        files = {name: digest for name, digest in digest_files(packed).items() if name != PACK_RECORD}
        record.write_text(json.dumps(seal(values | {"files": files})))
        with pytest.raises(ModelError, match="fetch"):
            unpack_model(packed, tmp_path / "back")
        assert not (tmp_path / "back").exists()
