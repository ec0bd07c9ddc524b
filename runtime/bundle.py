# SPDX-License-Identifier: Apache-2.0
"""The model directory: what `convert` writes, what `runtime` reads, and nothing else is shared between them.

A directory holds `bundle.json` and the files it lists. The list is complete: each file has its size
and SHA-256, every path is relative and stays inside the directory. The JSON is written with sorted
keys and no date, so the same checkpoint gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_args

from .errors import BundleError, InputError, one_line
from .spec import ADAPTER_NAMES, CHAT_FORMATS, ChatFormat, Family, RopeSpec, TextSpec
from .spec import MANIFEST as MANIFEST

FORMAT = "pocketphi-bundle"
VERSION = 1
ENCODER_GRAPHS: Mapping[str, tuple[str, ...]] = {
    "vision": ("tower", "projector"),
    "speech": ("front", "trunk", "speech-projector", "vision-projector"),
}
_MAX_LAYERS = 512  # llama.cpp's own limit
_MAX_VOCAB_SIZE = 1 << 24  # tokens; a real one has 200,064. Tables of that length are made from it
_MAX_CONTEXT = (1 << 31) - 1  # tokens: llama.cpp counts positions in 32 bits
_MISSING = f"listed in {MANIFEST} but missing"
_SEAL = "sha256"  # of the manifest itself; one written by hand has none
_MANIFEST_MAX_BYTES = 4 << 20  # a real one is under 16 KiB; more is not ours


@dataclass(frozen=True, slots=True)
class BundleFile:
    """One file of the directory."""

    path: str  # relative, with forward slashes
    size: int  # bytes
    sha256: str  # hex


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One LoRA: W x + (alpha / rank) · B (A x) on every linear of every layer."""

    file: str
    rank: int
    alpha: float
    quant: str  # ggml type of A and B


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """One encoder as ONNX graphs. Vision: tower, projector. Speech: front, trunk, and a projector by use."""

    graphs: Mapping[str, str]  # its name in ENCODER_GRAPHS -> file
    quant: str  # int8, int4, fp16 or fp32


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from."""

    name: str  # hub id, or the checkpoint folder's name
    revision: str | None  # hub commit, when known
    fingerprint: str  # sha256 over configuration, tokenizer and every safetensors header


@dataclass(frozen=True, slots=True)
class Bundle:
    """A validated `bundle.json`, and the directory it stands in."""

    root: Path
    name: str
    family: Family
    chat_format: ChatFormat
    tool_result_token: str  # opens a tool's result in a prompt: "<|tool|>" or "<|tool_response|>"
    text: TextSpec
    stop_ids: tuple[int, ...]
    decoder: str  # the backbone GGUF
    recipe: str  # "Q4_K_M", …
    quant: Mapping[str, str]  # tensor group -> ggml types in it, "Q4_K" or "Q4_K+Q6_K"
    merged: str | None  # the adapter merged into the backbone, if any
    adapters: Mapping[str, AdapterInfo]
    tokenizer: str
    source: Source
    converter: str  # "pocketphi 0.1.0"
    licence: str
    files: tuple[BundleFile, ...]
    encoders: Mapping[str, EncoderInfo] = field(default_factory=dict)  # "vision", "speech"

    def path(self, name: str) -> Path:
        """The absolute path of a listed file."""
        return self.root / name

    def encoder(self, name: str, ability: str) -> EncoderInfo:
        """An encoder that is needed to be able to do something.

        Raises:
            InputError: the model has none of that name.
        """
        found = self.encoders.get(name)
        if found is None:
            raise InputError(f"{self.name} has no {name} encoder: it cannot {ability}")
        return found

    def to_json(self) -> str:
        """`bundle.json` as text: sorted keys, no date, one final newline."""
        plain = asdict(self)
        del plain["root"]
        plain["files"] = sorted(plain["files"], key=lambda f: f["path"])
        return _sealed({"format": FORMAT, "version": VERSION, **plain})

    def check_hashes(self) -> Iterator[BundleFile]:
        """Read every file whole and compare its SHA-256; yields each one that is as listed.

        Raises:
            BundleError: the first file that differs.
        """
        for entry in self.files:
            self.check_hash(entry)
            yield entry

    def check_hash(self, entry: BundleFile, on_read: Callable[[int], None] | None = None) -> None:
        """Read one file whole and compare its SHA-256; `on_read` is told how many bytes more were read.

        Raises:
            BundleError: it differs, or cannot be read.
        """
        path = self.path(entry.path)
        try:
            found = sha256_of(path, on_read)
        except OSError as exc:
            raise BundleError(f"{path}: cannot be read: {exc.strerror}") from None
        if found != entry.sha256:
            raise BundleError(f"{path}: SHA-256 is {found[:16]}…, {MANIFEST} says {entry.sha256[:16]}…")


def _sealed(plain: dict[str, Any]) -> str:
    """A manifest's text with its own SHA-256 as one more field: that of the text without it."""
    seal = hashlib.sha256(_text(plain).encode("utf-8", "surrogatepass")).hexdigest()
    return _text(plain | {_SEAL: seal})


def _text(plain: dict[str, Any]) -> str:
    return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def sha256_of(path: Path, on_read: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces; `on_read` is told the size of each."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            if on_read is not None:
                on_read(len(piece))
    return digest.hexdigest()


def load(directory: Path) -> Bundle:
    """Read and check a model directory: every field, and that every listed file is there at its size.

    Contents are not hashed: see `Bundle.check_hashes`.

    Raises:
        BundleError: no such directory, not ours, another version, a bad field, a missing or resized file.
    """
    manifest = directory / MANIFEST
    try:
        is_directory, is_regular = directory.is_dir(), manifest.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        raise BundleError(f"{str(directory)[:100]!r}: cannot be opened as a model directory") from None
    if not is_directory:
        raise BundleError(f"{directory}: no such model directory")
    if not os.path.lexists(manifest):
        raise BundleError(
            f"{directory}: not a model directory: it has no {MANIFEST}. Make one with `pocketphi convert`"
        )
    if not is_regular:
        raise BundleError(f"{manifest}: is not a regular file")
    raw, text = _read_manifest(manifest)
    bundle = _parse(_Fields(raw, str(manifest)), directory)
    listed = {f.path for f in bundle.files}
    if len(listed) < len(bundle.files):
        raise BundleError(f"{manifest}: its list of files names one of them twice")
    graphs = [file for encoder in bundle.encoders.values() for file in encoder.graphs.values()]
    weights = [f"{graph}.data" for graph in graphs if (directory / f"{graph}.data").exists()]
    adapters = [adapter.file for adapter in bundle.adapters.values()]
    for name in [bundle.decoder, bundle.tokenizer, *adapters, *graphs, *weights]:
        if name not in listed:
            raise BundleError(f"{manifest}: {name!r} is used but not in its list of files")
    root = directory.resolve()
    for entry in bundle.files:
        path = directory / entry.path
        if not path.is_file():
            raise BundleError(f"{path}: {'is not a regular file' if path.exists() else _MISSING}")
        if not path.resolve().is_relative_to(root):
            raise BundleError(f"{path}: points outside the model directory")
        if path.stat().st_size != entry.size:
            raise BundleError(f"{path}: has {path.stat().st_size} bytes, {MANIFEST} says {entry.size}")
    if raw.pop(_SEAL, None) is not None and text != _sealed(raw):
        raise BundleError(
            f"{manifest}: is damaged: its own SHA-256 is another (to edit it, remove {_SEAL!r})"
        )
    return bundle


def _read_manifest(manifest: Path) -> tuple[dict[str, Any], str]:
    try:
        size = manifest.stat().st_size
        if size > _MANIFEST_MAX_BYTES:
            raise BundleError(f"{manifest}: {size} bytes is too large for a manifest")
        text = manifest.read_bytes().decode("utf-8")
        raw = json.loads(text)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as exc:
        raise BundleError(f"{manifest}: cannot be read as JSON: {one_line(exc)}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise BundleError(f"{manifest}: is not a {FORMAT} manifest")
    if raw.get("version") != VERSION:
        found = repr(raw.get("version"))[:60]
        raise BundleError(f"{manifest}: has format version {found}, expected {VERSION}: convert again")
    return raw, text


class _Fields:
    """Typed access to a JSON object; a wrong type is a BundleError that names the field."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise BundleError(f"{where}: expected an object")
        self._raw: dict[str, Any] = raw
        self.where = where

    def _get(self, key: str, kind: type | tuple[type, ...], want: str) -> Any:
        value = self._raw.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BundleError(f"{self.where}: field {key!r} is {str(value)[:60]!r}, expected {want}")
        return value

    def text(self, key: str) -> str:
        value = cast(str, self._get(key, str, "a string"))
        if not value.isprintable():
            raise BundleError(f"{self.where}: field {key!r} holds control characters")
        return value

    def text_or_none(self, key: str) -> str | None:
        return None if self._raw.get(key) is None else self.text(key)

    def count(self, key: str) -> int:
        value = cast(int, self._get(key, int, "a whole number"))
        if not 0 <= value < 1 << 53:
            raise BundleError(f"{self.where}: field {key!r} is {value}, expected a number from 0")
        return value

    def number(self, key: str) -> float:
        """A finite number above 0: every one in a manifest is."""
        value = self._get(key, (int, float), "a number")
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if not 0 < found < math.inf:
            raise BundleError(f"{self.where}: field {key!r} is {str(value)[:60]}, expected a number above 0")
        return found

    def flag(self, key: str) -> bool:
        return cast(bool, self._get(key, bool, "true or false"))

    def array(self, key: str) -> list[Any]:
        return cast("list[Any]", self._get(key, list, "a list"))

    def numbers_or_none(self, key: str) -> tuple[float, ...] | None:
        if self._raw.get(key) is None:
            return None
        values = self.array(key)
        if not all(isinstance(v, (int, float)) and 0 < v < 1e30 for v in values):
            raise BundleError(f"{self.where}: field {key!r} holds something that is not a number above 0")
        return tuple(float(v) for v in values)

    def fields(self, key: str) -> _Fields:
        return _Fields(self._raw.get(key), f"{self.where}: {key}")

    def items(self) -> list[tuple[str, Any]]:
        return list(self._raw.items())

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in allowed:
            raise BundleError(
                f"{self.where}: field {key!r} is {value!r}, expected one of {', '.join(allowed)}"
            )
        return value

    def file(self, key: str) -> str:
        value = self.text(key)
        pure = PurePosixPath(value)
        strange = any(c in value for c in "\\:") or not value or len(value) > 255
        if strange or pure.is_absolute() or ".." in pure.parts:
            raise BundleError(
                f"{self.where}: field {key!r} is {value[:60]!r}, expected a path inside the directory"
            )
        return value


def _parse(top: _Fields, root: Path) -> Bundle:
    adapters: dict[str, AdapterInfo] = {}
    for name, raw in top.fields("adapters").items():
        if name not in ADAPTER_NAMES:
            raise BundleError(f"{top.where}: adapter {name!r} is not one of {', '.join(ADAPTER_NAMES)}")
        one = _Fields(raw, f"{top.where}: adapter {name}")
        adapters[name] = AdapterInfo(
            one.file("file"), one.count("rank"), one.number("alpha"), one.text("quant")
        )
        if adapters[name].rank == 0:
            raise BundleError(f"{one.where}: field 'rank' is 0, expected a number above 0")
    encoders: dict[str, EncoderInfo] = {}
    for name, raw in top.fields("encoders").items():
        if name not in ADAPTER_NAMES:
            raise BundleError(f"{top.where}: encoder {name!r} is not one of {', '.join(ADAPTER_NAMES)}")
        one = _Fields(raw, f"{top.where}: encoder {name}")
        graphs = one.fields("graphs")
        encoders[name] = EncoderInfo({g: graphs.file(g) for g in ENCODER_GRAPHS[name]}, one.text("quant"))
    text = _parse_text(top.fields("text"))
    merged = top.text_or_none("merged")
    if merged is not None and merged not in ADAPTER_NAMES:
        raise BundleError(f"{top.where}: field 'merged' is {merged!r}, expected {' or '.join(ADAPTER_NAMES)}")
    stop_ids = tuple(top.array("stop_ids"))
    if not stop_ids or not all(type(i) is int and 0 <= i < text.vocab_size for i in stop_ids):
        raise BundleError(f"{top.where}: field 'stop_ids' must list ids below {text.vocab_size}")
    source = top.fields("source")
    files = []
    for raw in top.array("files"):
        one = _Fields(raw, f"{top.where}: files")
        files.append(BundleFile(one.file("path"), one.count("size"), one.text("sha256")))
    return Bundle(
        root=root,
        name=top.text("name"),
        family=cast(Family, top.one_of("family", get_args(Family))),
        chat_format=cast(ChatFormat, top.one_of("chat_format", CHAT_FORMATS)),
        tool_result_token=top.text("tool_result_token"),
        text=text,
        stop_ids=stop_ids,
        decoder=top.file("decoder"),
        recipe=top.text("recipe"),
        quant={k: str(v) for k, v in top.fields("quant").items()},
        merged=merged,
        adapters=adapters,
        tokenizer=top.file("tokenizer"),
        source=Source(source.text("name"), source.text_or_none("revision"), source.text("fingerprint")),
        converter=top.text("converter"),
        licence=top.text("licence"),
        files=tuple(files),
        encoders=encoders,
    )


def _parse_text(t: _Fields) -> TextSpec:
    r = t.fields("rope")
    rope = RopeSpec(
        dims=r.count("dims"),
        theta=r.number("theta"),
        original_context=r.count("original_context"),
        attention_factor=r.number("attention_factor"),
        short_factor=r.numbers_or_none("short_factor"),
        long_factor=r.numbers_or_none("long_factor"),
    )
    for factors in (rope.short_factor, rope.long_factor):
        if factors is not None and len(factors) != rope.dims // 2:
            raise BundleError(f"{r.where}: has {len(factors)} factors for {rope.dims} rotated dimensions")
    if (rope.short_factor is None) != (rope.long_factor is None):
        raise BundleError(f"{r.where}: has only one of short_factor and long_factor")
    spec = TextSpec(
        d_model=t.count("d_model"),
        n_layers=t.count("n_layers"),
        n_heads=t.count("n_heads"),
        n_kv_heads=t.count("n_kv_heads"),
        head_dim=t.count("head_dim"),
        d_ff=t.count("d_ff"),
        vocab_size=t.count("vocab_size"),
        context_length=t.count("context_length"),
        rms_eps=t.number("rms_eps"),
        tied_head=t.flag("tied_head"),
        rope=rope,
    )
    sizes = (spec.d_model, spec.n_layers, spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.d_ff)
    if min(*sizes, spec.vocab_size, spec.context_length, rope.original_context) < 1:
        raise BundleError(f"{t.where}: a size is zero")
    for name, size, most in (
        ("n_layers", spec.n_layers, _MAX_LAYERS),
        ("vocab_size", spec.vocab_size, _MAX_VOCAB_SIZE),
        ("context_length", spec.context_length, _MAX_CONTEXT),
    ):
        if size > most:
            raise BundleError(f"{t.where}: field {name!r} is {size}, expected at most {most}")
    return spec
