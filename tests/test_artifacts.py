"""Manifests, digests and seals."""

import json
from pathlib import Path
from typing import Any

import pytest

from sqft.artifacts import Manifest, digest_file, digest_files, digest_json, seal, unseal, write_json
from sqft.errors import WorkspaceError


def test_a_changed_seal_is_noticed() -> None:
    sealed = seal({"a": 1, "b": [1.5, (2,)], "c": None})
    assert unseal(json.loads(json.dumps(sealed))) == {"a": 1, "b": [1.5, [2]], "c": None}
    cases: tuple[Any, ...] = (sealed | {"a": 2}, {"a": 1}, [], sealed | {"more": 0})
    for damaged in cases:
        with pytest.raises(ValueError, match="written"):
            unseal(damaged)


def test_manifest_round_trip_and_damage(tmp_path: Path) -> None:
    manifest = Manifest("train", "key", metrics={"loss": 1.5})
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    (tmp_path / "manifest.json").write_text('{"stage": 1')
    with pytest.raises(WorkspaceError, match="damaged"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(WorkspaceError, match="not written by sqft"):
        Manifest.read(tmp_path)


def test_digests_follow_content_not_time(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    path.parent.mkdir()
    path.write_text("one")
    cache = tmp_path / "cache.json"
    before = digest_files(path.parent, cache=cache)
    assert before == digest_files(path.parent, cache=cache) == {"file": digest_file(path)}
    path.write_text("two!")
    assert digest_files(path.parent, cache=cache) != before
    assert digest_file(path, cache=cache) == digest_file(path)
    cache.write_text(cache.read_text().replace(digest_file(path), "remembered"))
    assert digest_file(path, cache=cache) == "remembered"
    cache.write_text("not json")
    assert digest_files(path.parent, cache=cache) == {"file": digest_file(path)}


def test_json_digest_ignores_the_order_of_keys(tmp_path: Path) -> None:
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    write_json(tmp_path / "x.json", {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
