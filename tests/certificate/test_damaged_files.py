"""Whatever a file holds, a check says so in one line and nothing is raised."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.certificate import check_integrity, check_provenance
from sqft.certificate.stored import StoredTensors
from sqft.errors import CertificateError
from tests.merged_models import MergedDirectories

Merge = Callable[..., MergedDirectories]
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def safetensors(header: Any) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


HEADERS: list[Any] = [
    [],
    None,
    1,
    "",
    "[" * 100_000,
    {"__metadata__": []},
    {"a": []},
    {"a": {}},
    *({"a": {key: value for key, value in ENTRY.items() if key != left_out}} for left_out in ENTRY),
    {"a": ENTRY | {"data_offsets": [0]}},
    {"a": ENTRY | {"data_offsets": [4, 0]}},
    {"a": ENTRY | {"data_offsets": [-4, 0]}},
    {"a": ENTRY | {"data_offsets": ["0", "4"]}},
    {"a": ENTRY | {"data_offsets": [0, 8]}},
    {"a": ENTRY | {"dtype": 3}},
    {"a": ENTRY | {"dtype": "F5"}},
    {"a": ENTRY | {"shape": [1.5]}},
    {"a": ENTRY | {"shape": [2]}},
    {"a": ENTRY | {"shape": [2**40, 2**40]}},
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: json.dumps(header)[:60])
def test_a_header_that_is_not_one_is_refused_in_one_line(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(header))
    with pytest.raises(CertificateError) as caught:
        StoredTensors([path]).raw("a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 16, struct.pack("<Q", 2**62) + b"{}"])
def test_bytes_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CertificateError, match="damaged"):
        StoredTensors([path])
    with pytest.raises(CertificateError, match="cannot be read"):
        StoredTensors([tmp_path])


JSONS = ["[]", "null", "{}", "{", "\x00", '{"a": ' * 100_000, '{"config_groups": [], "weight_map": [1]}']
FILES = [
    ("merged", "config.json"),
    ("merged", "sqft_certificate.json"),
    ("merged", "model.safetensors.index.json"),
    ("base", "config.json"),
    ("adapter", "adapter_config.json"),
]


@pytest.mark.parametrize(("part", "name"), FILES)
def test_no_json_escapes_as_an_error(merge_copy: Merge, part: str, name: str) -> None:
    directories = merge_copy()
    for text in JSONS:
        (getattr(directories, part) / name).write_text(text)
        checks = check_provenance(directories.merged, directories.base, directories.adapter)
        assert any(not check.passed for check in checks)
        assert all("\n" not in check.detail for check in checks)


@pytest.mark.parametrize(
    "quantization",
    [None, [], {}, {"config_groups": None}, {"config_groups": {}}, {"config_groups": {"g": {"weights": {}}}}],
)
def test_a_config_without_its_grid_is_no_pass(merge_copy: Merge, quantization: Any) -> None:
    directories = merge_copy()
    path = directories.merged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    failed = {check.name for check in check_integrity(directories.merged) if not check.passed}
    assert {"codes", "zeros"} <= failed


def test_random_damage_never_escapes(merge_copy: Merge) -> None:
    directories = merge_copy()
    chosen = random.Random(0)
    paths = [
        directories.merged / "model.safetensors",
        directories.merged / "sqft_masks.safetensors",
        directories.base / "sqft_latent.safetensors",
        directories.adapter / "adapter_model.safetensors",
    ]
    for path in paths:
        whole = path.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        for _ in range(12):
            damaged = bytearray(whole)
            for _ in range(chosen.randint(1, 3)):
                damaged[chosen.randrange(length + 8)] = chosen.randrange(32, 127)
            path.write_bytes(damaged)
            checks = check_provenance(directories.merged, directories.base, directories.adapter)
            assert any(not check.passed for check in checks)
        path.write_bytes(whole)
