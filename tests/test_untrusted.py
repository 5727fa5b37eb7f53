"""Bounds on what others made."""

import itertools
import os
import re
import resource
import threading
import time
from pathlib import Path

import pytest
import yaml
from jinja2.exceptions import SecurityError

from sqft.untrusted import BoundedSandbox, memory_limit, parse_yaml, read_bounded, time_limit


def test_only_regular_files_of_a_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(tmp_path / "file", 5) == b"12345"
    os.mkfifo(tmp_path / "pipe")
    for path, limit in (
        (tmp_path / "file", 4),
        (tmp_path / "pipe", 9),
        (Path("/dev/zero"), 9),
        (tmp_path, 9),
    ):
        with pytest.raises(ValueError, match="it is"):
            read_bounded(path, limit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "'a' is given twice .line 2, column 1"),
        ("a: [", "line 1"),
        ("a: 2001-99-99", "month"),
        ("a: !!int x", "invalid literal"),
        ("a: " + "9" * 5000, "digits"),
        ("[" * 5000, "nested too deeply"),
        ("a: &a [*a]", "refers to itself"),
        (
            "a0: &a0 [1]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
            "values",
        ),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: \0", "special characters"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse_yaml(text)
    assert "\n" not in str(raised.value)


def test_yaml_that_is_read() -> None:
    text = "a: &x {b: [1, 2.5, null]}\nc: *x\nd: {<<: *x, e: 1}"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None


def test_a_time_limit_ends_loops_and_regular_expressions() -> None:
    started = time.process_time()
    with pytest.raises(TimeoutError, match=r"longer than 0\.1 s"), time_limit(0.1):
        sum(1 for _ in itertools.count())
    with pytest.raises(TimeoutError), time_limit(0.1):
        re.match(r"(a+)+$", "a" * 60 + "b")
    assert time.process_time() - started < 5
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # no signal comes late


def test_a_time_limit_elsewhere_than_in_the_main_thread_is_none() -> None:
    done = []

    def work() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_a_memory_limit_ends_what_takes_more() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError, match="more than 64 MiB"), memory_limit(64 * 2**20):
        assert "a" * 2**27
    with memory_limit(64 * 2**20):
        assert "a" * 2**20
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_templates_are_bounded() -> None:
    sandbox = BoundedSandbox()
    assert sandbox.from_string("{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 3 * 4.5 }}").render() == "ababab102413.5"
    for text in ("{{ 'a' * 99999999 }}", "{{ 9 ** 99999 }}", "{{ [0] * 99999999 }}"):
        with pytest.raises(SecurityError, match="larger"):
            sandbox.from_string(text).render()
