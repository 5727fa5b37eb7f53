"""`sqft chat`."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["chat"]

HELP = "One line is one message; /new forgets what was said, /exit or the end of the input ends."


def chat(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A model directory, packed or not, or a GGUF file.")
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="A plain LoRA to apply, unmerged (for GGUF one in GGUF).")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue each line as it stands, without the chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Talk to a finished model, line by line, in its runtime.

    Also with lines from a pipe: echo "Hello" | sqft chat runs/mine/merged
    """
    import torch

    from sqft.errors import ExportError
    from sqft.runtimes.chat import open_chat
    from sqft.runtimes.speed import open_artefact

    answer = None
    count = threads or torch.get_num_threads()
    for sparse in (True, False):  # with our kernels where llama.cpp takes them
        artefact = open_artefact(directory, adapter=adapter, packed_products=sparse)
        try:
            answer = open_chat(
                artefact, max_new_tokens=max_new_tokens, temperature=temperature, raw=raw, threads=count
            )
            break
        except ExportError:
            if not sparse or artefact.runtime != "llama.cpp + sqft":
                raise
    assert answer is not None
    talks = sys.stdin.isatty()
    if talks:
        print(f"{artefact.name} in {artefact.runtime}. {HELP}")
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (line := input("> " if talks else "").strip()) != "/exit":
            if line == "/new":
                messages = list(start)
            elif line:
                messages.append({"role": "user", "content": line})
                said = answer(messages, _show)
                print()
                messages.append({"role": "assistant", "content": said})


def _show(piece: str) -> None:
    """Print a piece of an answer, but no codes that a terminal would obey."""
    print("".join(c for c in piece if c.isprintable() or c in "\n\t"), end="", flush=True)
