"""Reading what others made, bounded in size, depth, time and memory.

Every function raises ValueError, with the reason in one line, for a file that is not what it should be; the
caller knows what the file was meant to be, and says so.
"""

import resource
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
import yaml
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment

__all__ = ["BoundedSandbox", "check_regular", "memory_limit", "parse_yaml", "read_bounded", "time_limit"]

RENDER_SECONDS = 5.0
RENDER_BYTES = 256 * 2**20
TEMPLATE_SIZE = 10_000_000
YAML_NODES = 100_000  # with aliases counted as often as they are used


def check_regular(path: Path) -> int:
    """The size of a regular file: opening a pipe can wait for ever, and a device has no end.

    Raises: OSError if there is none, ValueError if it is something else.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    return found.st_size


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a regular file, of at most `limit_bytes`. Raises: OSError, ValueError."""
    if check_regular(path) > limit_bytes:
        raise ValueError(f"it is larger than {limit_bytes:,} bytes")
    return path.read_bytes()


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The values of one YAML document, refused if a key is given twice or aliases make it huge.

    Raises: ValueError, whatever is wrong with it.
    """
    try:
        reader = loader(text)
        root = reader.get_single_node()
        if root is None:
            return None
        _count_nodes(root, {})
        return reader.construct_document(root)
    except yaml.YAMLError as error:
        raise ValueError(_describe(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(str(error).strip().split("\n")[0] or type(error).__name__) from None


class _BoundedTemplate(jinja2.Template):
    """A template that may render for a few seconds, in some memory."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        with time_limit(RENDER_SECONDS), memory_limit(RENDER_BYTES):
            return super().render(*args, **kwargs)


class BoundedSandbox(SandboxedEnvironment):
    """Jinja without access to Python's internals, bounded in time and in the size of what it multiplies."""

    intercepted_binops = frozenset(["*", "**"])
    template_class = _BoundedTemplate

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`, unless that is huge."""
        size = max(len(side) if hasattr(side, "__len__") else 1 for side in (left, right))
        numbers = [abs(side) for side in (left, right) if isinstance(side, int)]
        if size * max(numbers, default=1) > TEMPLATE_SIZE or (
            operator == "**" and max(numbers, default=0) > 64
        ):
            raise SecurityError(f"a template computes something larger than {TEMPLATE_SIZE:,}")
        return super().call_binop(context, operator, left, right)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block of Python code that takes longer; outside of the main thread, never.

    Python's own loops and its regular expressions can be interrupted, code of other languages cannot.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Raise MemoryError in a block that takes so much more memory than the process has when it begins.

    Where /proc does not tell how much that is, and outside of the main thread, there is no limit. Other
    threads must not allocate much meanwhile: the limit is the whole process's.
    """
    try:
        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        held = None
    if held is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [held + more_bytes, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {more_bytes >> 20} MiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _count_nodes(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes a document has, checking keys on the way. Raises: ValueError."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError(f"an alias refers to itself{_place(node)}")
        return sizes[id(node)]
    sizes[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise ValueError(f"{key.value!r} is given twice{_place(key)}")
                seen.add(key.value)
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_count_nodes(child, sizes) for child in children)
    if size > YAML_NODES:
        raise ValueError(f"it has more than {YAML_NODES:,} values{_place(node)}")
    sizes[id(node)] = size
    return size


def _place(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1}, column {node.start_mark.column + 1})"


def _describe(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).strip().split("\n")[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)
