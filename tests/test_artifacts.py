"""Directories are whole or not there."""

import errno
import json
from pathlib import Path

import pytest

from sqft.artifacts import (
    Manifest,
    digest_file,
    digest_files,
    digest_json,
    new_directory,
    seal,
    unseal,
    write_json,
)
from sqft.errors import WorkspaceError


def test_directory_appears_only_when_its_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "stage"
    with new_directory(final) as partial:
        (partial / "file").write_text("x")
        assert not final.exists()
    assert (final / "file").read_text() == "x"
    assert not partial.exists()


def test_failure_leaves_a_partial_directory_and_the_next_try_begins_anew(tmp_path: Path) -> None:
    final = tmp_path / "stage"

    def fail_half_way() -> None:
        with new_directory(final) as partial:
            (partial / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert not final.exists()
    assert (tmp_path / "stage.partial" / "half").exists()
    with new_directory(final, keep_partial=True) as partial:
        assert (partial / "half").exists()
    with new_directory(tmp_path / "other"):
        pass
    assert not (tmp_path / "other" / "half").exists()


def test_an_existing_directory_is_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with new_directory(tmp_path / "stage") as partial:
            (partial / "file").write_text(text)
    assert (tmp_path / "stage" / "file").read_text() == "new"


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="no space left"), new_directory(tmp_path / "stage"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (tmp_path / "stage").exists()


def test_what_a_kill_left_of_a_file_being_written_is_cleared(tmp_path: Path) -> None:
    partial = tmp_path / "stage.partial"
    partial.mkdir()
    (partial / "kept").write_text("x")
    (partial / "manifest.json.tmp").write_text("{")
    with new_directory(tmp_path / "stage", keep_partial=True) as directory:
        assert sorted(digest_files(directory)) == ["kept"]


def test_a_changed_seal_is_noticed() -> None:
    sealed = seal({"a": 1, "b": [1.5, (2,)], "c": None})
    assert unseal(json.loads(json.dumps(sealed))) == {"a": 1, "b": [1.5, [2]], "c": None}
    for damaged in (sealed | {"a": 2}, {"a": 1}, [], sealed | {"more": 0}):
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
    cache.write_text("not json")
    assert digest_files(path.parent, cache=cache) == {"file": digest_file(path)}


def test_json_digest_ignores_the_order_of_keys(tmp_path: Path) -> None:
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    write_json(tmp_path / "x.json", {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
