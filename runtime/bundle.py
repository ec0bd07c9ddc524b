# SPDX-License-Identifier: Apache-2.0
"""The model directory: what `convert` writes, what `runtime` reads, and nothing else is shared between them.

A directory holds `bundle.json` and the files it lists. The list is complete: each file has its size
and SHA-256, every path is relative and stays inside the directory. The JSON is written with sorted
keys and no date, so the same checkpoint gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_args

from .errors import BundleError, InputError, one_line
from .json_fields import Fields
from .spec import ADAPTER_NAMES, BACKBONE_DATA, CHAT_FORMATS, Backbone, ChatFormat, Family, RopeSpec, TextSpec
from .spec import MANIFEST as MANIFEST

FORMAT = "pocketphi-bundle"
VERSION = 1
ENCODER_GRAPHS: Mapping[str, tuple[str, ...]] = {
    "vision": ("tower", "projector"),
    "speech": ("front", "trunk", "speech-projector", "vision-projector"),
}
ONNX_LORA_QUANTS = ("fp32", "fp16", "int8")
_MAX_LAYERS = 512  # llama.cpp's own limit
_MAX_VOCAB_SIZE = 1 << 24  # tokens; a real one has 200,064. Tables of that length are made from it
_MAX_CONTEXT = (1 << 31) - 1  # tokens: llama.cpp counts positions in 32 bits
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

    file: str | None  # the GGUF; None where the backbone is ONNX alone
    rank: int
    alpha: float
    quant: str  # ggml type of A and B, or of ONNX alone its kind


@dataclass(frozen=True, slots=True)
class OnnxInfo:
    """The backbone as ONNX graphs with one data file; `convert/write_onnx_decoder.py` says what they take."""

    model: str  # token ids in, for onnxruntime-genai
    decoder: str  # embeddings in, for `decoder_onnx`
    embedding: str  # token ids to embeddings
    quant: Mapping[str, str]  # "linear", "qkv", "down", "head" -> fp32, fp16, int8 or int4
    lora_quant: str  # fp32, fp16 or int8
    adapters: Mapping[str, str]  # adapter name -> ONNX Runtime's adapter file


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
    decoder: str | None  # the backbone GGUF; None where it is ONNX alone
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
    onnx: OnnxInfo | None = None
    vocabulary: str | None = None  # a GGUF without weights, for grammars where there is no other

    @property
    def backbones(self) -> tuple[Backbone, ...]:
        """The engines' backbones that are here, the better one first."""
        gguf: tuple[Backbone, ...] = () if self.decoder is None else ("gguf",)
        onnx: tuple[Backbone, ...] = () if self.onnx is None else ("onnx",)
        return gguf + onnx

    @property
    def gguf(self) -> Path:
        """The backbone GGUF.

        Raises:
            InputError: there is none.
        """
        if self.decoder is None:
            raise InputError(f"{self.root}: has no GGUF backbone: convert it with --backbone gguf or both")
        return self.path(self.decoder)

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
    bundle = _parse(Fields(raw, str(manifest)), directory)
    listed = {f.path for f in bundle.files}
    if len(listed) < len(bundle.files):
        raise BundleError(f"{manifest}: its list of files names one of them twice")
    graphs = [file for encoder in bundle.encoders.values() for file in encoder.graphs.values()]
    if (onnx := bundle.onnx) is not None:
        graphs += [onnx.model, onnx.decoder, onnx.embedding, *onnx.adapters.values()]
    datas = [f"{graph}.data" for graph in graphs]
    if onnx is not None:
        datas += [str(PurePosixPath(n).parent / BACKBONE_DATA) for n in (onnx.decoder, onnx.embedding)]
    weights = [name for name in datas if os.path.lexists(directory / name)]
    adapters = [adapter.file for adapter in bundle.adapters.values()]
    for name in [bundle.decoder, bundle.tokenizer, bundle.vocabulary, *adapters, *graphs, *weights]:
        if name is not None and name not in listed:
            raise BundleError(f"{manifest}: {name!r} is used but not in its list of files")
    root = directory.resolve()
    for entry in bundle.files:
        path = directory / entry.path
        try:
            state = path.stat()
        except OSError:
            raise BundleError(f"{path}: listed in {MANIFEST} but missing") from None
        if not stat.S_ISREG(state.st_mode):
            raise BundleError(f"{path}: is not a regular file")
        if not path.resolve().is_relative_to(root):
            raise BundleError(f"{path}: points outside the model directory")
        if state.st_size != entry.size:
            raise BundleError(f"{path}: has {state.st_size} bytes, {MANIFEST} says {entry.size}")
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


def _parse(top: Fields, root: Path) -> Bundle:
    adapters: dict[str, AdapterInfo] = {}
    for name, raw in top.fields("adapters").items():
        if name not in ADAPTER_NAMES:
            raise BundleError(f"{top.where}: adapter {name!r} is not one of {', '.join(ADAPTER_NAMES)}")
        one = Fields(raw, f"{top.where}: adapter {name}")
        adapters[name] = AdapterInfo(
            one.file_or_none("file"), one.count("rank"), one.number("alpha"), one.text("quant")
        )
        if adapters[name].rank == 0:
            raise BundleError(f"{one.where}: field 'rank' is 0, expected a number above 0")
    encoders: dict[str, EncoderInfo] = {}
    for name, raw in top.fields("encoders").items():
        if name not in ADAPTER_NAMES:
            raise BundleError(f"{top.where}: encoder {name!r} is not one of {', '.join(ADAPTER_NAMES)}")
        one = Fields(raw, f"{top.where}: encoder {name}")
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
        one = Fields(raw, f"{top.where}: files")
        files.append(BundleFile(one.file("path"), one.count("size"), one.text("sha256")))
    return Bundle(
        root=root,
        name=top.text("name"),
        family=cast(Family, top.one_of("family", get_args(Family))),
        chat_format=cast(ChatFormat, top.one_of("chat_format", CHAT_FORMATS)),
        tool_result_token=top.text("tool_result_token"),
        text=text,
        stop_ids=stop_ids,
        decoder=top.file_or_none("decoder"),
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
        onnx=_parse_onnx(top, adapters),
        vocabulary=top.file_or_none("vocabulary"),
    )


def _parse_onnx(top: Fields, adapters: Mapping[str, AdapterInfo]) -> OnnxInfo | None:
    """The ONNX backbone, which has every adapter. One backbone at least is there, with all its adapters."""
    onnx = None
    if top.has("onnx"):
        o = top.fields("onnx")
        files = o.fields("adapters")
        if files.keys() != adapters.keys():
            raise BundleError(f"{o.where}: its adapters are not those of the model")
        onnx = OnnxInfo(
            model=o.file("model"),
            decoder=o.file("decoder"),
            embedding=o.file("embedding"),
            quant={k: str(v) for k, v in o.fields("quant").items()},
            lora_quant=o.one_of("lora_quant", ONNX_LORA_QUANTS),
            adapters={name: files.file(name) for name in adapters},
        )
    gguf = top.has("decoder")
    if not gguf and onnx is None:
        raise BundleError(f"{top.where}: names no backbone, expected 'decoder', 'onnx' or both")
    if any((a.file is not None) != gguf for a in adapters.values()):
        raise BundleError(f"{top.where}: has a GGUF of the backbone or of an adapter without the other")
    return onnx


def _parse_text(t: Fields) -> TextSpec:
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
