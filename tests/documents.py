"""Runs what documents show: files, commands and Python, each marked by a comment before its block."""

import glob
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from sqft.cli import run_command_line

BLOCK = re.compile(
    r"<!-- (?P<mark>run(?:: exit code (?P<code>\d))?|file: (?P<name>\S+)) -->\n"
    r"```(?P<language>\w*)\n(?P<text>.*?)```",
    re.DOTALL,
)


def run_document(text: str, names: dict[str, object], change: Callable[[str], str] = str) -> list[list[str]]:
    """Run the marked blocks of a document in the current directory, in order; returns the commands.

    names: what the document's Python has defined so far; it is added to. change: what to alter in a block.
    """
    commands = []
    for block in BLOCK.finditer(text):
        source = change(block["text"])
        if block["name"]:
            Path(block["name"]).write_text(source)
        elif block["language"] == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as a user's Python shows no one else's deprecations
                exec(compile(source, "document", "exec"), names)
        else:
            for line in source.splitlines():
                words = [found for word in line.split("#")[0].split() for found in expand(word)]
                if not words:
                    continue
                assert words[0] == "sqft"
                assert run_command_line(words[1:]) == int(block["code"] or 0), words
                commands.append(words)
    return commands


def expand(word: str) -> list[str]:
    """What a shell makes of a word with a star."""
    return sorted(glob.glob(word)) if "*" in word else [word]
