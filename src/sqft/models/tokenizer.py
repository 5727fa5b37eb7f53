"""The tokenizer of a model. It is opened without torch where its files say which kind it is."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from sqft.errors import ModelError, first_line

__all__ = ["load_tokenizer", "quiet_transformers"]

# How transformers calls what is told by tokenizer.json alone.
PLAIN_KIND = "TokenizersBackend"


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory, with a padding token.

    Raises: ModelError if it has none, or one with more tokens than the model.
    """
    try:
        with quiet_transformers():
            kind = _kind(Path(directory))
            tokenizer = kind.from_pretrained(directory, trust_remote_code=trust_remote_code)
            tokenizer.decode(tokenizer(["a", "a b"])["input_ids"][1])
    except Exception as error:  # of many kinds: parts of a wrong type meet code that computes with them
        raise ModelError(f"{directory} has no tokenizer that can be read ({first_line(error)})") from error
    _check_vocabulary(Path(directory) / "config.json", tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and hints off the screen for a while.

    Some of its bars know no switch, so what it writes to stderr is dropped.
    """
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _kind(directory: Path) -> Any:
    """The class that opens a tokenizer: what `AutoTokenizer`, which imports torch, would find."""
    if not (directory / "config.json").exists():
        try:
            stated = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            stated = None
        if (
            isinstance(stated, dict)
            and stated.get("tokenizer_class") == PLAIN_KIND
            and "auto_map" not in stated
        ):
            from transformers.tokenization_utils_tokenizers import TokenizersBackend

            return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def _check_vocabulary(path: Path, tokenizer: Any) -> None:
    """Refuse ids past the embedding's end: an IndexError on a CPU, and on a GPU the process dies."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return  # opening the model says what is wrong with it
    # Special tokens past the end do no harm unused: conversions and tokenizer classes add such.
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = [tokenizer.eos_token_id or 0, tokenizer.pad_token_id or 0, *tokenizer("a")["input_ids"]]
    last = max([*used, *(set(tokenizer.get_vocab().values()) - special)])
    if isinstance(size, int) and last >= size:
        raise ModelError(
            f"the tokenizer of {path.parent} has ids up to {last}, but the model has {size} tokens; "
            "take the tokenizer that belongs to it"
        )
