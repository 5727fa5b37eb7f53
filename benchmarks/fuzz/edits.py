"""Seeded edits: of bytes, of values as JSON and YAML hold them, and of safetensors headers."""

import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["NASTY", "Editor"]

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e-320, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "0", "nan", "\0", "\ud800", "\x1b]0;x\x07",
    "a" * 5000, "/".join(("..", "..", "outside")), "*", "(", "(.*.*.*.*.*.*)*x", "{x}", "{0.__class__}",
    "{{ 7 * 7 }}", "cuda", "https://a.invalid/b", [], {}, [[]], [None], [1, "a"], {"a": 1}, {"": {}},
)  # fmt: skip
BYTES = (
    b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\0", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b'"', b"{",
    b"}", b"[", b"]", b",", b":", b"\n", b"\r\n", b"\\", b"\\ud800", b"\\u0000", b"NaN", b"-Infinity",
    b"1e999", b"null", b"\xef\xbb\xbf", b"&a [*a]", b"<<", b"!!python/name:os.system", b"- " * 100,
    b"9" * 400, b"[" * 3000,
)  # fmt: skip
TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "F8_E4M3", "X")


@dataclass(frozen=True)
class Editor:
    """Edits by a seed. works: False leaves everything as it is, so that a whole file can be tried too."""

    draw: random.Random
    works: bool = True

    def raw(self, content: bytes) -> bytes:
        """One to six edits: bytes flipped, overwritten, put in, taken out, repeated, swapped, cut off."""
        for _ in range(self.draw.choice((1, 1, 1, 2, 3, 6)) if self.works else 0):
            content = self._edit_once(content)
        return content

    def _edit_once(self, content: bytes) -> bytes:
        draw = self.draw
        place = draw.randrange(len(content) + 1)
        until = min(len(content), place + draw.choice((1, 2, 4, 8, 64, 1000)))
        kind = draw.randrange(8)
        if kind == 0 and place < len(content):
            return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
        if kind in (1, 2):
            new = draw.choice(BYTES)
            return content[:place] + new + content[place + (len(new) if kind == 1 else 0) :]
        if kind == 3:
            return content[:place] + content[until:]
        if kind == 4:
            return content[:until] + content[place:]
        if kind == 5:
            first, second = sorted((place, draw.randrange(len(content) + 1)))
            return content[second:] + content[first:second] + content[:first]
        if kind == 6:
            return content[:place]
        return content[:place] + draw.randbytes(until - place) + content[until:]

    def tree(self, value: Any, nasty: tuple[Any, ...] = NASTY) -> Any:
        """One to three edits of nested values: replaced, taken out, renamed, exchanged, put into a list."""
        for _ in range(self.draw.choice((1, 1, 1, 2, 3)) if self.works else 0):
            value = json.loads(json.dumps(value))
            places = list(_places(value))
            if not places:
                return self.draw.choice(nasty)
            holder, key = self.draw.choice(places)
            self._edit_place(holder, key, places, nasty)
            try:
                json.dumps(value)
            except ValueError:  # an exchange put something into itself
                return _deep()
        return value

    def _edit_place(self, holder: Any, key: Any, places: list[tuple[Any, Any]], nasty: Any) -> None:
        draw, kind, old = self.draw, self.draw.randrange(10), holder[key]
        if kind == 5 and isinstance(old, int | float) and not isinstance(old, bool):
            holder[key] = draw.choice((-old, old + 1, old * 1000, str(old)))
        elif kind == 6:
            del holder[key]
        elif kind == 7 and isinstance(holder, dict):
            holder[draw.choice(("", "x", "__class__", key.upper(), f"{key} "))] = holder.pop(key)
        elif kind == 8:
            other, place = draw.choice(places)
            holder[key], other[place] = other[place], old
        elif kind == 9:
            holder[key] = draw.choice(([old], {"a": old}, _deep()))
        else:
            holder[key] = draw.choice(nasty)

    def json_file(self, path: Path) -> None:
        """Edit a JSON file, mostly as values."""
        content = path.read_bytes()
        if self.draw.random() < 0.85 and self.works:
            path.write_text(json.dumps(self.tree(json.loads(content))))
        else:
            path.write_bytes(self.raw(content))

    def yaml_text(self, values: Any) -> bytes:
        """Values as YAML, edited, mostly as values."""
        if self.draw.random() < 0.75:
            values = self.tree(values)
            try:
                return yaml.safe_dump(values).encode()
            except RecursionError:
                return json.dumps(values).encode()  # which is YAML too
        return self.raw(yaml.safe_dump(values).encode())

    def safetensors(self, content: bytes) -> bytes:
        """An edit of the header's values, of its text, of its length, or of any byte."""
        draw = self.draw
        kind = draw.choice(["bytes", "text", "length", *["values"] * 4])
        if kind == "bytes" or not self.works:
            return self.raw(content)
        (length,) = struct.unpack("<Q", content[:8])
        header, data = content[8 : 8 + length], content[8 + length :]
        if kind == "length":
            new = draw.choice((0, 1, 7, length - 1, length + 1, 2**32, 2**63, 2**64 - 1))
            return struct.pack("<Q", new % 2**64) + header + data
        if kind == "text":
            changed = self.raw(header)
        else:
            changed = json.dumps(self.tree(json.loads(header), NASTY + TYPES * 3)).encode()
        return struct.pack("<Q", len(changed)) + changed + data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything inside of nested values, as (what holds it, key or index)."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _deep() -> Any:
    value: Any = 0
    for _ in range(500):
        value = [value]
    return value
