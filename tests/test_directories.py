"""Directories are whole or not there, and nothing of a user's is replaced or removed."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft import directories
from sqft.artifacts import digest_files
from sqft.directories import claim_folder, free_place, new_directory, write_files
from sqft.errors import WorkspaceError
from sqft.marks import MARK, changed_since, read_mark


def put(final: Path, text: str, **about: str) -> None:
    with new_directory(final, about=about) as partial:
        (partial / "file").write_text(text)


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
    def killed() -> None:
        with new_directory(tmp_path / "stage") as partial:
            (partial / "kept").write_text("x")
            (partial / "manifest.json.tmp").write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    with new_directory(tmp_path / "stage", keep_partial=True) as partial:
        assert sorted(digest_files(partial)) == ["kept"]


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "file").write_text("edited"),
        lambda place: (place / "notes").write_text("x"),
        lambda place: (place / ".hidden").write_text("x"),
        lambda place: (place / "folder").mkdir(),
        lambda place: (place / "link").symlink_to("file"),
        lambda place: (place / "file").unlink(),
        lambda place: (place / MARK).unlink(),
        lambda place: (place / MARK).write_text("{}"),
    ],
)
def test_what_is_not_as_we_wrote_it_is_never_replaced(change: Callable[[Path], Any], tmp_path: Path) -> None:
    place = tmp_path / "result"
    put(place, "old")
    change(place)
    before = {path.name: path.is_file() and path.read_bytes() for path in place.iterdir()}
    with pytest.raises(WorkspaceError, match="which sqft did not write or which changed since"):
        put(place, "new")
    assert {path.name: path.is_file() and path.read_bytes() for path in place.iterdir()} == before
    assert free_place(place, {}) == tmp_path / "result-2"


def test_a_copied_directory_is_still_ours(tmp_path: Path) -> None:
    put(tmp_path / "a", "text")
    (tmp_path / "b").mkdir()
    for name in ("file", MARK):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    assert changed_since(tmp_path / "b") is None


def test_a_flipped_bit_that_kept_size_and_time_is_seen_by_reading(tmp_path: Path) -> None:
    put(tmp_path / "a", "text")
    path = tmp_path / "a" / "file"
    times = path.stat()
    path.write_text("tex!")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed_since(tmp_path / "a") is None
    assert changed_since(tmp_path / "a", thoroughly=True) == "file"


def test_a_partial_directory_of_a_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis").write_text("years of work")
    (tmp_path / "out.partial-2").write_text("a file")
    with new_directory(tmp_path / "out") as partial:
        assert partial.name == "out.partial-3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial", "out.partial-2"]
    assert (tmp_path / "out.partial" / "thesis").read_text() == "years of work"


def test_a_partial_directory_of_ours_that_gained_a_file_after_it_was_done_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(directories, "_put_in_place", lambda *arguments: interrupt())
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path / "out", "one")
    (tmp_path / "out.partial" / "thesis").write_text("years of work")
    put(tmp_path / "out", "two")
    assert (tmp_path / "out.partial" / "thesis").read_text() == "years of work"


def interrupt() -> None:
    raise KeyboardInterrupt


def test_two_at_a_time_build_beside_each_other(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from sqft.directories import new_directory\n"
        f"with new_directory(pathlib.Path({str(tmp_path / 'out')!r})) as partial:\n"
        "    print(partial.name, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "out.partial\n"
        with new_directory(tmp_path / "out") as partial:
            assert partial.name == "out.partial-2"
        other.communicate("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_reader_sees_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "out", "old")
    exchange = directories._exchange

    def look(first: Path, second: Path) -> bool:
        assert (second / "file").read_text() == "old"
        assert exchange(first, second)
        assert (second / "file").read_text() == "new"
        return True

    monkeypatch.setattr(directories, "_exchange", look)
    put(tmp_path / "out", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_a_swap_in_one_step_the_gap_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directories, "_exchange", lambda first, second: False)
    put(tmp_path / "out", "old")
    put(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [message for message in caplog.messages if "cannot swap directories" in message]


def test_a_symlink_or_file_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "text").write_text("x")
    for name in ("link", "text"):
        with pytest.raises(WorkspaceError, match="is not a directory"):
            put(tmp_path / name, "new")
        assert free_place(tmp_path / name, {}) == tmp_path / f"{name}-2"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_belongs_to_who_claimed_it(tmp_path: Path) -> None:
    mine, yours = {"recipe": "mine.yaml"}, {"recipe": "yours.yaml"}
    assert claim_folder(tmp_path / "llama", mine) == tmp_path / "llama"
    assert claim_folder(tmp_path / "llama", yours) == tmp_path / "llama-2"
    assert claim_folder(tmp_path / "llama", mine) == tmp_path / "llama"
    (tmp_path / "other").mkdir()
    assert claim_folder(tmp_path / "other", mine) == tmp_path / "other"
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "weights").write_text("x")
    assert claim_folder(tmp_path / "user", mine) == tmp_path / "user-2"


def test_a_file_of_a_user_stays_beside_ours(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        assert write_files(tmp_path, {"report.json": text}) == [tmp_path / "report.json"]
    (tmp_path / "report.json").write_text("edited")
    for text in (b"three", b"four"):
        assert write_files(tmp_path, {"report.json": text}) == [tmp_path / "report-2.json"]
    assert (tmp_path / "report.json").read_text() == "edited"
    assert (tmp_path / "report-2.json").read_bytes() == b"four"


def test_marks_that_are_no_marks(tmp_path: Path) -> None:
    for text in ("", "[]", "{", "[" * 100_000, '{"sha256": 1}'):
        (tmp_path / MARK).write_text(text)
        assert read_mark(tmp_path) is None
