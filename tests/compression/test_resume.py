"""Runs that were cut, and states that are of no use."""

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compression.tiny_runs import quantize, sparsify

from sqft.compression.walk import BlockWalk
from sqft.models import CheckpointWriter, open_checkpoint, read_masks

Maker = Callable[..., Path]
STATE = "resume.safetensors"


class Interrupted(Exception):
    pass


def interrupt(*arguments: Any, **options: Any) -> None:
    raise Interrupted


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    same = [(first / name).read_bytes() == (second / name).read_bytes() for name in names]
    return names == sorted(path.name for path in second.iterdir()) and all(same)


def note_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    loaded: list[str] = []
    load = BlockWalk.load
    monkeypatch.setattr(BlockWalk, "load", lambda walk, name: (loaded.append(name), load(walk, name))[1])
    return loaded


@pytest.mark.parametrize("compress", [sparsify, quantize])
def test_a_run_cut_while_it_is_closed_does_no_block_again(
    tiny_model_dir: Maker, tmp_path: Path, compress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model_dir("llama")
    whole = compress(directory, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "close", interrupt)
        with pytest.raises(Interrupted):
            compress(directory, tmp_path / "cut")
    assert (tmp_path / "cut" / STATE).stat().st_size < 20_000  # hidden states have no reader any more
    loaded = note_loads(monkeypatch)
    again = compress(directory, tmp_path / "cut")
    assert loaded == []
    assert [r.to_json() | {"seconds": 0} for r in again] == [r.to_json() | {"seconds": 0} for r in whole]
    assert same_files(tmp_path / "whole", tmp_path / "cut")


def test_masked_layers_that_are_not_quantized_stay_sparse_after_a_cut(
    tiny_model_dir: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model_dir("llama")
    sparsify(directory, tmp_path / "sparse", method="magnitude")
    masks = read_masks(tmp_path / "sparse")
    settings: dict[str, Any] = {"target_modules": ["down_proj"], "method": "rtn"}
    quantize(directory, tmp_path / "whole", masks, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "close", interrupt)
        with pytest.raises(Interrupted):
            quantize(directory, tmp_path / "cut", masks, **settings)
    quantize(directory, tmp_path / "cut", masks, **settings)
    assert same_files(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("change", ["settings", "threads", "damage"])
def test_a_state_of_no_use_is_told(
    tiny_model_dir: Maker,
    tmp_path: Path,
    change: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = tiny_model_dir("llama")
    with monkeypatch.context() as patch:
        patch.setattr(BlockWalk, "unload", lambda walk, name: name.endswith("1") and interrupt())
        with pytest.raises(Interrupted):
            sparsify(directory, tmp_path / "cut")
    told = "is of a run with other"
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    if change == "damage":
        state = tmp_path / "cut" / STATE
        state.write_bytes(state.read_bytes()[:50])
        told, change = "cannot be read", "starts over"
    loaded = note_loads(monkeypatch)
    with caplog.at_level(logging.WARNING):
        sparsify(directory, tmp_path / "cut", sparsity=0.4 if change == "settings" else 0.5)
    assert loaded == ["model.layers.0", "model.layers.1"]
    assert [r for r in caplog.messages if told in r and change in r and STATE in r]
    assert not (tmp_path / "cut" / STATE).exists()
    open_checkpoint(tmp_path / "cut")


def test_a_run_that_goes_on_says_nothing(
    tiny_model_dir: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny_model_dir("llama")
    with monkeypatch.context() as patch:
        patch.setattr(BlockWalk, "unload", lambda walk, name: name.endswith("1") and interrupt())
        with pytest.raises(Interrupted):
            sparsify(directory, tmp_path / "cut")
    loaded = note_loads(monkeypatch)
    sparsify(directory, tmp_path / "cut")
    assert loaded == ["model.layers.1"]
    assert not [message for message in caplog.messages if STATE in message]


def cut_after_the_first_block(
    compress: Callable[..., Any], directory: Path, out: Path, **settings: Any
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockWalk, "unload", lambda walk, name: name.endswith("1") and interrupt())
        with pytest.raises(Interrupted):
            compress(directory, out, **settings)


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(bytes(content))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": lambda path: path.unlink(),
    "header": lambda path: flip(path, 9),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("compress", "file"),
    [
        (sparsify, "model.safetensors"),
        (sparsify, "sqft_masks.safetensors"),
        (sparsify, STATE),
        (quantize, "model.safetensors"),
        (quantize, "sqft_latent.safetensors"),
    ],
)
def test_torn_files_of_a_cut_run_are_never_taken_for_whole(
    tiny_model_dir: Maker, tmp_path: Path, compress: Callable[..., Any], file: str, damage: str
) -> None:
    directory = tiny_model_dir("llama")
    compress(directory, tmp_path / "whole")
    cut_after_the_first_block(compress, directory, tmp_path / "cut")
    DAMAGE[damage](tmp_path / "cut" / file)
    compress(directory, tmp_path / "cut")
    assert same_files(tmp_path / "whole", tmp_path / "cut")


def test_flipped_bits_of_a_cut_run_change_nothing_and_are_told(
    tiny_model_dir: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny_model_dir("llama")
    settings: dict[str, Any] = {
        "method": "gptaq",
        "group_size": 32,
    }  # reads the dense model's hidden states too
    quantize(directory, tmp_path / "whole", **settings)
    cut_after_the_first_block(quantize, directory, tmp_path / "cut", **settings)
    draw = random.Random(0)
    for trial in range(12):
        again = tmp_path / f"again-{trial}"
        shutil.copytree(tmp_path / "cut", again)
        files = sorted(path for path in again.iterdir() if path.is_file())
        damaged = files[trial % len(files)]
        flip(damaged, draw.randrange(damaged.stat().st_size), draw.randrange(8))
        caplog.clear()
        quantize(directory, again, **settings)
        assert same_files(tmp_path / "whole", again), damaged
        told = [r for r in caplog.records if r.levelno >= logging.WARNING and str(again) in r.getMessage()]
        assert len(told) <= 1
        assert told or damaged.name != STATE


def test_hidden_states_are_computed_again_from_proven_blocks(
    tiny_model_dir: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny_model_dir("llama")
    sparsify(directory, tmp_path / "whole")
    cut_after_the_first_block(sparsify, directory, tmp_path / "cut")
    flip(tmp_path / "cut" / STATE, -5)  # in the last hidden state
    measured: list[str] = []
    collect = BlockWalk.collect
    monkeypatch.setattr(
        BlockWalk, "collect", lambda walk, name, *a: measured.append(name) or collect(walk, name, *a)
    )
    sparsify(directory, tmp_path / "cut")
    assert measured == ["model.layers.1"]  # the first block is passed through, not compressed again
    assert [r for r in caplog.messages if "hidden states are computed again" in r]
    assert same_files(tmp_path / "whole", tmp_path / "cut")
