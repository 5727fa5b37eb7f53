"""Damage to what was exported: one bit or one tensor, in every format and every part of it."""

import json
import shutil
import struct
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from sqft.artifacts import SEAL, digest_files, seal
from sqft.export import export_model
from sqft.export.verification import check_export

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:openvino"),
]

# Asymmetric grids, so that there are zero points; 16 bits hold symmetric ones only.
GRIDS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"symmetric": False},
    "gptq": {"symmetric": False},
    "safetensors": {},
    "gguf": {"symmetric": False, "scale_bits": 7},
    "openvino": {"symmetric": False},
}
RUNTIMES = {"gguf": "xllamacpp", "openvino": "openvino"}
LINEAR = "model.layers.0.mlp.up_proj"
PLAIN = {"gguf": "output.weight", "openvino": "sqft.lm_head.weight"}
NORM = {"gguf": "output_norm.weight", "openvino": "sqft.model.norm.weight"}
PARTS = {
    "compressed-tensors": {
        "code": "weight_packed",
        "scale": "weight_scale",
        "zero point": "weight_zero_point",
    },
    "gptq": {"code": "qweight", "scale": "scales", "zero point": "qzeros"},
    "safetensors": {"code": "weight"},
    "openvino": {"code": "codes", "scale": "scale", "zero point": "zero_point"},
}
Q4_1 = {"scale": 0, "zero point": 2, "code": 4}  # bytes of a block: scale, minimum, codes
BITS = [
    (format, part)
    for format in GRIDS
    for part in ("code", "scale", "zero point", "head", "norm")
    if (format, part) not in {("safetensors", "scale"), ("safetensors", "zero point")}
]


@pytest.fixture(scope="module")
def whole(merged_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(format: str) -> Path:
        if format in RUNTIMES:
            pytest.importorskip(RUNTIMES[format])
        if format not in made:
            made[format] = tmp_path_factory.mktemp("whole") / "artefact"
            export_model(merged_dir(**GRIDS[format]), format, made[format])
            assert not failed(made[format], merged_dir(**GRIDS[format]))
        return made[format]

    return make


@pytest.fixture
def artefact(whole: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an export that the test may damage."""
    return lambda format: Path(shutil.copytree(whole(format), tmp_path / "artefact"))


def failed(directory: Path, merged: Path | None = None) -> set[str]:
    """The checks that failed; that everything is as an export made anew fails whenever another one does."""
    names = {finding.name for finding in check_export(directory, merged) if not finding.passed}
    assert merged is None or ("made anew" in names) == bool(names)
    return names - {"made anew"}


def find(directory: Path, format: str, part: str) -> tuple[Path, int]:
    """The file and offset of the first byte of a part."""
    if format == "gguf":
        path = directory / "model.gguf"
        name = {"head": PLAIN[format], "norm": NORM[format]}.get(part, "blk.0.ffn_up.weight")
        tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
        return path, int(tensor.data_offset) + Q4_1.get(part, 0)
    if format == "openvino":
        own = f"sqft.{LINEAR}.{PARTS[format].get(part)}"
        name = {"head": PLAIN[format], "norm": NORM[format]}.get(part, own)
        layer = ET.parse(directory / "openvino_model.xml").find(f".//layer[@name='{name}']/data")
        assert layer is not None
        return directory / "openvino_model.bin", int(layer.attrib["offset"])
    own = f"{LINEAR}.{PARTS[format].get(part)}"
    name = {"head": "lm_head.weight", "norm": "model.norm.weight"}.get(part, own)
    return find_tensor(directory / "model.safetensors", name)


def find_tensor(path: Path, name: str | None = None) -> tuple[Path, int]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = name or next(key for key in header if key != "__metadata__")
    return path, 8 + length + int(header[name]["data_offsets"][0])


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("format", "part"), BITS)
def test_one_flipped_bit_is_caught_twice(
    artefact: Callable[[str], Path], merged_dir: Callable[..., Path], format: str, part: str
) -> None:
    directory = artefact(format)
    flip(*find(directory, format, part))
    assert failed(directory) == {"digests"}
    assert failed(directory, merged_dir(**GRIDS[format])) == {"digests", "codes"}


@pytest.mark.parametrize("format", GRIDS)
@pytest.mark.parametrize("part", ["code", "scale", "norm"])
def test_a_missing_tensor_is_caught_twice(
    artefact: Callable[[str], Path], merged_dir: Callable[..., Path], format: str, part: str
) -> None:
    directory = artefact(format)
    if format == "openvino":
        names = {"norm": NORM[format]}
        name = names.get(part) or f"sqft.{LINEAR}.{PARTS[format][part]}"
        path = directory / "openvino_model.xml"
        text = path.read_text()
        assert f'name="{name}"' in text
        path.write_text(text.replace(f'name="{name}"', 'name="lost"'))
    elif format == "gguf":
        path, name = directory / "model.gguf", NORM[format] if part == "norm" else "blk.0.ffn_up.weight"
        data = path.read_bytes()
        assert data.count(name.encode()) == 1
        path.write_bytes(data.replace(name.encode(), name.encode()[:-1] + b"_"))
    else:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        own = PARTS[format].get(part, "weight")
        del tensors["model.norm.weight" if part == "norm" else f"{LINEAR}.{own}"]
        save_file(tensors, path, metadata={"format": "pt"})
    assert failed(directory) == {"digests"}
    assert failed(directory, merged_dir(**GRIDS[format])) >= {"digests", "codes"}


def test_one_flipped_mask_bit_is_caught_twice(
    artefact: Callable[[str], Path], merged_dir: Callable[..., Path]
) -> None:
    directory = artefact("compressed-tensors")
    flip(*find_tensor(directory / "sqft_masks.safetensors"))
    assert failed(directory) == {"digests"}
    assert failed(directory, merged_dir(symmetric=False)) == {"digests", "masks"}
    (directory / "sqft_masks.safetensors").unlink()
    assert failed(directory, merged_dir(symmetric=False)) == {"digests", "masks"}


@pytest.mark.parametrize("format", GRIDS)
def test_another_tokenizer_is_caught_twice(
    artefact: Callable[[str], Path], merged_dir: Callable[..., Path], format: str
) -> None:
    directory = artefact(format)
    if format == "gguf":
        path = directory / "model.gguf"
        data = path.read_bytes()
        flip(path, data.index(b"<pad>", data.index(b"tokenizer.ggml.tokens")) + 1)
    else:
        path = directory / "tokenizer.json"
        values = json.loads(path.read_text())
        vocabulary = values["model"]["vocab"]
        first, second = sorted(vocabulary)[10:12]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        path.write_text(json.dumps(values))
    assert failed(directory) == {"digests"}
    assert failed(directory, merged_dir(**GRIDS[format])) == {"digests", "tokenizer"}


def test_the_tokenizer_that_openvino_runs_is_covered_by_its_digest(artefact: Callable[[str], Path]) -> None:
    directory = artefact("openvino")
    path = directory / "openvino_tokenizer.bin"
    flip(path, path.stat().st_size // 2)
    assert failed(directory) == {"digests"}


@pytest.mark.parametrize("format", GRIDS)
def test_lost_cut_and_added_files_are_caught(
    artefact: Callable[[str], Path], merged_dir: Callable[..., Path], format: str
) -> None:
    directory = artefact(format)
    (directory / "pytorch_model.bin").write_bytes(b"0")
    assert failed(directory, merged_dir(**GRIDS[format])) == {"digests"}
    (directory / "pytorch_model.bin").unlink()
    weights = {"gguf": "model.gguf", "openvino": "openvino_model.bin"}.get(format, "model.safetensors")
    data = (directory / weights).read_bytes()
    (directory / weights).write_bytes(data[: len(data) // 2])
    assert failed(directory, merged_dir(**GRIDS[format])) >= {"digests", "codes"}
    (directory / weights).unlink()
    assert failed(directory, merged_dir(**GRIDS[format])) >= {"digests", "codes"}


@pytest.mark.parametrize("name", ["openvino_tokenizer.bin", "openvino_detokenizer.xml", "openvino_model.xml"])
def test_openvinos_graphs_are_compared_with_new_ones(
    artefact: Callable[[str], Path], merged_dir: Callable[..., Path], name: str
) -> None:
    directory = artefact("openvino")
    path = directory / name
    flip(path, path.stat().st_size // 2)
    record = json.loads((directory / "sqft_export.json").read_text())
    record["files"] = digest_files(directory)  # whoever edits can hash anew
    (directory / "sqft_export.json").write_text(
        json.dumps(seal({k: v for k, v in record.items() if k != SEAL}))
    )
    findings = check_export(directory, merged_dir(**GRIDS["openvino"]))
    assert "made anew" in {finding.name for finding in findings if not finding.passed}


def test_settings_that_are_hashed_anew_are_caught(
    artefact: Callable[[str], Path], merged_dir: Callable[..., Path]
) -> None:
    directory = artefact("compressed-tensors")
    (directory / "generation_config.json").write_text('{"temperature": 9.0}')
    (directory / ".hidden").write_text("x")
    record = json.loads((directory / "sqft_export.json").read_text())
    record["files"] = digest_files(directory)
    (directory / "sqft_export.json").write_text(
        json.dumps(seal({k: v for k, v in record.items() if k != SEAL}))
    )
    findings = check_export(directory, merged_dir(symmetric=False))
    failed = {finding.name: finding.detail for finding in findings if not finding.passed}
    assert failed.keys() == {"digests", "made anew"}
    assert failed["digests"] == ".hidden was added, hidden"
    assert "generation_config.json" in failed["made anew"]
