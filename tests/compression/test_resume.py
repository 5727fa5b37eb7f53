"""Runs that were cut, and states that are of no use."""

import logging
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
    masks, settings = read_masks(tmp_path / "sparse"), {"target_modules": ["down_proj"], "method": "rtn"}
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
