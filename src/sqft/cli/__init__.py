"""The command line. One module a command; this one turns every error into one line and an exit code."""

import os
import sys
from collections.abc import Sequence

from sqft.errors import SqftError, is_out_of_memory

__all__ = ["main", "run_command_line"]

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
OUT_OF_MEMORY = (
    "out of memory; lower evaluate.batch_size, calibration.num_samples or the sequence_length of a section, "
    "in training raise train.gradient_accumulation or set train.gradient_checkpointing: true"
)


def main() -> None:
    """The entry point of `sqft` and of `python -m sqft`."""
    # Libraries underneath draw bars and print advice of their own; a user who wants them sets these.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(run_command_line(sys.argv[1:]))


def run_command_line(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code.

    0: done. 1: `verify` found a difference. 2: the user can put it right, and one line on stderr says how.
    130: interrupted. A defect of sqft itself ends in a traceback.
    """
    from typer.exceptions import Abort, TyperException
    from typer.main import get_command

    from sqft.cli.app import app
    from sqft.cli.messages import catch_termination, quiet_warnings, verbosity

    words, level = _take_verbosity(arguments)
    told = verbosity.set(level)
    try:
        with quiet_warnings(), catch_termination():
            code = get_command(app).main(words, prog_name="sqft", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # what Typer makes of KeyboardInterrupt
            raise KeyboardInterrupt
    except SqftError as error:
        return _complain(str(error), EXIT_ERROR)
    except TyperException as error:
        place = getattr(getattr(error, "ctx", None), "command_path", "sqft")
        return _complain(f"{error.format_message().rstrip('.')}; try '{place} --help'", EXIT_ERROR)
    except (KeyboardInterrupt, Abort):
        return _complain("interrupted; the same command goes on where it stopped", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _complain(f"{place}{error.strerror}", EXIT_ERROR)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _complain(OUT_OF_MEMORY, EXIT_ERROR)
    finally:
        verbosity.reset(told)
    return code if isinstance(code, int) else 0


def _take_verbosity(arguments: Sequence[str]) -> tuple[list[str], int]:
    """The arguments without -q and -v, wherever they stand, and how much is to be told."""
    levels = {"-q": -1, "--quiet": -1, "-v": 1, "--verbose": 1}
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    given = [levels[word] for word in arguments[:end] if word in levels]
    words = [
        word if place >= end else _expand_home(word)
        for place, word in enumerate(arguments)
        if place >= end or word not in levels
    ]
    return words or ["--help"], given[-1] if given else 0


def _expand_home(word: str) -> str:
    """A path below ~ written out, which a shell leaves as it is in --option=~/path."""
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return name + equals + os.path.expanduser(value) if value.startswith("~/") else word


def _complain(message: str, code: int) -> int:
    """Print one line, whatever the message holds: no codes of others that a terminal would obey."""
    words = " ".join(message.split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words)
    print(f"sqft: {line}", file=sys.stderr)
    return code
