# SPDX-License-Identifier: Apache-2.0
"""GGUF files taken apart and put together again byte by byte, so that each byte of them can be wrong.

A second reader and writer on purpose: it believes everything, and writes whatever it is told to.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

KINDS = {"u8": 0, "u16": 2, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "string": 8, "array": 9, "u64": 10}
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 13: (256, 176), 14: (256, 210)}


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


def scalar(kind: str, value: float | bool | str) -> bytes:
    """A value as it stands in the file."""
    if isinstance(value, str):
        return text(value.encode("utf-8"))
    return struct.pack("<" + _CODES[KINDS[kind]], value)


def strings(values: list[bytes]) -> bytes:
    """An array of strings, as it stands in the file."""
    return u32(KINDS["string"]) + u64(len(values)) + b"".join(map(text, values))


def numbers(kind: str, values: list[float]) -> bytes:
    """An array of numbers, as it stands in the file."""
    return u32(KINDS[kind]) + u64(len(values)) + struct.pack(f"<{len(values)}{_CODES[KINDS[kind]]}", *values)


@dataclass
class Part:
    """One tensor."""

    name: bytes
    dims: list[int]  # the row's length first
    type_id: int
    data: bytes
    offset: int | None = None  # None: where it belongs


@dataclass
class Gguf:
    """A file in pieces."""

    keys: list[tuple[bytes, int, bytes]]  # name, kind, value
    parts: list[Part]
    version: int = 3
    alignment: int = 32
    tail: bytes = b""

    def set(self, name: str, kind: str, value: float | bool | str | bytes) -> None:
        """Give a key a value, in its place or at the end."""
        raw = value if isinstance(value, bytes) else scalar(kind, value)
        entry = (name.encode(), KINDS[kind], raw)
        places = [i for i, (key, _, _) in enumerate(self.keys) if key == name.encode()]
        if places:
            self.keys[places[0]] = entry
        else:
            self.keys.append(entry)

    def drop(self, name: str) -> None:
        """Leave a key out."""
        self.keys = [k for k in self.keys if k[0] != name.encode()]

    def part(self, name: str) -> Part:
        """The tensor of that name."""
        return next(p for p in self.parts if p.name == name.encode())

    def string_array(self, name: str) -> list[bytes]:
        """The strings of an array."""
        raw = next(value for key, _, value in self.keys if key == name.encode())
        found, at = [], 12
        for _ in range(struct.unpack_from("<Q", raw, 4)[0]):
            (n,) = struct.unpack_from("<Q", raw, at)
            found.append(raw[at + 8 : at + 8 + n])
            at += 8 + n
        return found

    def pack(self) -> bytes:
        """The file."""
        out = b"GGUF" + u32(self.version) + u64(len(self.parts)) + u64(len(self.keys))
        out += b"".join(text(name) + u32(kind) + value for name, kind, value in self.keys)
        at = 0
        data = bytearray()
        for p in self.parts:
            offset = at if p.offset is None else p.offset
            out += text(p.name) + u32(len(p.dims)) + b"".join(map(u64, p.dims)) + u32(p.type_id) + u64(offset)
            data += p.data + bytes(-len(p.data) % self.alignment)
            at += len(p.data) + -len(p.data) % self.alignment
        return out + bytes(-len(out) % self.alignment) + bytes(data) + self.tail


def read(path: Path) -> Gguf:
    """Take a good file apart."""
    raw, at = path.read_bytes(), 24

    def take(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, raw, at)
        at += struct.calcsize("<" + code)
        return int(value)

    def take_text() -> bytes:
        nonlocal at
        n = take("Q")
        at += n
        return raw[at - n : at]

    n_tensors, n_keys = struct.unpack_from("<QQ", raw, 8)
    keys = []
    for _ in range(n_keys):
        name, kind, start = take_text(), take("I"), at
        if kind == KINDS["array"]:
            inner, n = take("I"), take("Q")
            for _ in range(n) if inner == KINDS["string"] else ():
                take_text()
            at += 0 if inner == KINDS["string"] else n * struct.calcsize("<" + _CODES[inner])
        elif kind == KINDS["string"]:
            take_text()
        else:
            at += struct.calcsize("<" + _CODES[kind])
        keys.append((name, kind, raw[start:at]))
    table = [
        (take_text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(n_tensors)
    ]
    start = at + -at % 32
    parts = []
    for name, dims, type_id, offset in table:
        block, size = _BLOCKS[type_id]
        n_bytes = size
        for i, n in enumerate(dims):
            n_bytes *= n // block if i == 0 else n
        parts.append(Part(name, dims, type_id, raw[start + offset : start + offset + n_bytes]))
    return Gguf(keys, parts)
