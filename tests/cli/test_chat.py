"""`sqft chat`: lines from a pipe, answered in each runtime, with what was said before."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.cli import run_command_line
from sqft.errors import ExportError
from sqft.formats.gguf_model import write_gguf
from sqft.formats.packed import pack_model
from sqft.formats.weights import open_source
from sqft.models import load_model, load_tokenizer

MergedDir = Callable[..., Path]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: object, lines: str, code: int = 0) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert run_command_line(["chat", *map(str, arguments)]) == code
        shown = capsys.readouterr()
        return shown.err if code else shown.out

    return run


def test_lines_commands_and_memory(
    merged_dir: MergedDir, talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[list[str]] = []

    def answer(messages: list[dict[str, str]], told: Callable[[str], None]) -> str:
        heard.append([f"{message['role']} {message['content']}" for message in messages])
        told("yes,\x1b[2J ")
        told("indeed")
        return "yes, indeed"

    monkeypatch.setattr("sqft.runtimes.chat.open_chat", lambda *_, **__: answer)
    shown = talk(merged_dir(), "--system", "be brief", lines="one\n\n two \n/new\nthree\n/exit\nfour\n")
    assert shown == "yes,[2J indeed\n" * 3  # what is piped on holds answers alone, and nothing to obey
    assert heard == [
        ["system be brief", "user one"],
        ["system be brief", "user one", "assistant yes, indeed", "user two"],
        ["system be brief", "user three"],
    ]


def greedy(directory: Path, text: str, count: int, *, template: bool) -> str:
    tokenizer, model = load_tokenizer(directory), load_model(directory)
    if template:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not template).input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_answers_are_the_models_own(merged_dir: MergedDir, talk: Callable[..., str], tmp_path: Path) -> None:
    directory = merged_dir(pattern="16:32 window 2")
    options = ["--max-new-tokens", 6, "--threads", 1]
    for template in (True, False):
        shown = talk(directory, *options, *([] if template else ["--raw"]), lines="what is 3?\n")
        expected = greedy(directory, "what is 3?", 6, template=template)
        assert shown == "".join(c for c in expected if c.isprintable() or c in "\n\t") + "\n"
    pack_model(directory, tmp_path / "packed")
    assert len(talk(tmp_path / "packed", *options, lines="what is 3?\n").encode()) > 1
    torch.manual_seed(1)
    warm = [talk(directory, *options, "--temperature", 2.0, lines="what is 3?\n") for _ in range(3)]
    assert len(set(warm)) > 1


def test_a_gguf_file_answers_without_our_kernels_too(
    merged_dir: MergedDir, talk: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")

    def refuse() -> None:
        raise ExportError("they fit another xllamacpp")

    monkeypatch.setattr("sqft.runtimes.chat.use_packed_products", refuse)
    write_gguf(open_source(merged_dir()), tmp_path / "model.gguf")
    options = ["--threads", 1, "--max-new-tokens", 5]
    twice = talk(tmp_path / "model.gguf", *options, lines="what is 3?\n/new\nwhat is 3?\n")
    half = len(twice) // 2
    assert twice[:half] == twice[half:]
    assert len(twice) > 2
    raw = talk(tmp_path / "model.gguf", *options, "--raw", lines="what is 3?\n")
    assert raw.endswith("\n")
    assert raw != twice[:half]


def without_template(directory: Path, target: Path) -> Path:
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = None
    model = load_model(directory)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def test_what_cannot_chat_is_told_in_one_line(
    tiny_model_dir: Callable[..., Path], talk: Callable[..., str], tmp_path: Path
) -> None:
    plain = without_template(tiny_model_dir(), tmp_path / "plain")
    assert "--raw each line is continued" in talk(plain, lines="hi\n", code=2)
    assert talk(plain, "--raw", "--max-new-tokens", 2, lines="hi\n").endswith("\n")
    config: dict[str, Any] = json.loads((plain / "config.json").read_text())
    limit = config["max_position_embeddings"]
    assert "start anew with /new" in talk(plain, "--raw", "--max-new-tokens", limit, lines="hi\n", code=2)
    assert "is neither a model directory" in talk(tmp_path, lines="", code=2)
