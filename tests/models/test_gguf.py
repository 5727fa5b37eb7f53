"""GGUF files that claim what they do not have."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from sqft.errors import ModelError
from sqft.models import resolve_model
from sqft.models.gguf_header import read_gguf_header
from sqft.sections import ModelSection

HIDDEN, INNER, VOCABULARY = 32, 64, 260
BLOCK = {
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    **{name: (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def write_llama(path: Path, keep: Callable[[str], bool] = lambda name: True, *, blocks: int = 2) -> Path:
    """A llama of two blocks with a tokenizer; keep: which of its tensors are written."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    characters = [chr(256 + i) for i in range(VOCABULARY - 4)]
    # Two merges: transformers 5.17 reads an array of one string as the string.
    pairs = [characters[0] + characters[1], characters[2] + characters[3]]
    writer.add_token_list(["<s>", "</s>", "<|endoftext|>", *characters[:-1], *pairs])
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_token_types([3, 3] + [1] * (VOCABULARY - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,), "output": (VOCABULARY, HIDDEN)}
    shapes |= {f"blk.{block}.{name}": shape for block in range(2) for name, shape in BLOCK.items()}
    for name, shape in shapes.items():
        if keep(f"{name}.weight"):
            writer.add_tensor(f"{name}.weight", np.full(shape, 0.1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_gguf(path: Path) -> Path:
    return resolve_model(ModelSection(source=str(path)), path.parent / "models")


def test_a_whole_file(tmp_path: Path) -> None:
    header = read_gguf_header(write_llama(tmp_path / "whole.gguf"))
    assert header.num_blocks == 2
    assert header.tensors["blk.1.ffn_up.weight"] == (HIDDEN, INNER)
    assert header.values["llama.context_length"] == 64
    assert (open_gguf(tmp_path / "whole.gguf") / "config.json").is_file()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda name: False, "states 2 blocks and has tensors of 0"),
        (lambda name: not name.startswith("blk.1"), "states 2 blocks and has tensors of 1"),
        (lambda name: name != "blk.1.ffn_up.weight", r"lacks 1 tensors .* model\.layers\.1\.mlp\.up_proj"),
        (lambda name: name != "output_norm.weight", "lacks 1 tensors"),
        (lambda name: name != "token_embd.weight", "lacks 1 tensors|cannot be read"),
    ],
)
def test_missing_tensors_are_not_made_up(keep: Callable[[str], bool], message: str, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "part.gguf", keep)
    with pytest.raises(ModelError, match=message):
        open_gguf(path)
    assert not list((tmp_path / "models").glob("[!.]*"))  # a file of digests may stand there, and no model


def test_a_head_that_is_not_there_is_the_embedding(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tied.gguf", lambda name: name != "output.weight")
    assert (open_gguf(path) / "config.json").is_file()


def test_a_million_blocks_are_refused_at_once(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "deep.gguf", blocks=2**31 - 1)
    started = time.process_time()
    with pytest.raises(ModelError, match="states 2147483647 blocks"):
        open_gguf(path)
    assert time.process_time() - started < 5


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"GGML" + bytes(40), "does not begin"),
        (head(version=9), "version is 9"),
        (head(values=2**63), "claims .* values"),
        (head(tensors=2**40), "claims .* tensors"),
        (head(values=1) + text("a") + struct.pack("<IIQ", 9, 4, 2**63), "elements"),
        (head(values=1) + text("a") + struct.pack("<IIQ", 9, 8, 2**22), "too early"),
        (head(values=1) + struct.pack("<Q", 2**62), "too early"),
        (head(values=1) + text("a") + struct.pack("<I", 99), "unknown type 99"),
        (head(values=1) + text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40, "elements"),
        (head(values=2) + (text("a") + struct.pack("<IB", 0, 1)) * 2, "twice"),
        (head(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 2**60, 0, 0), "beyond the end"),
        (head(tensors=1) + text("t") + struct.pack("<I", 200), "dimensions"),
        (head(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 31, 2, 0), "whole blocks"),
        (head(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 32, 999, 0), "999"),
    ],
)
def test_headers_that_lie(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(ModelError, match=message):
        read_gguf_header(path)
    assert time.process_time() - started < 5
