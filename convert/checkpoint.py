# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint directory as lazy tensors: everything in it is checked before any work begins.

    config.json  tokenizer.json                        required
    model.safetensors                                  or model.safetensors.index.json and its shards
    generation_config.json  tokenizer_config.json  chat_template.jinja  LICENSE
    vision-lora/  speech-lora/                         adapter_config.json, adapter_model.safetensors

Nothing in it is executed, and a pickle is never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..runtime.errors import CheckpointError
from ..runtime.spec import ADAPTER_NAMES
from .safetensors_file import Dtype, TensorInfo, parse_header
from .source_file import SourceFile, parse_json_object, quoted, read_bytes, read_json_object, reason, shown

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_SMALL_MAX_BYTES = 4 << 20  # configurations, templates, licences: real ones are under 100 kB
_LARGE_MAX_BYTES = 64 << 20  # tokenizer.json of a 200,064-token vocabulary has 16 MB; an index under 1 MB
_PIECE = 1 << 17  # numbers widened at a time: the piece and its source stay in the second-level cache
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_PLAIN_LORA = {  # what W x + alpha / r · B (A x) cannot express; absent means plain
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """One LoRA in PEFT's layout: `vision-lora/` or `speech-lora/`."""

    name: str  # "vision" or "speech"
    config: Mapping[str, Any]  # adapter_config.json: r, lora_alpha and target_modules are checked
    tensors: Mapping[str, TensorInfo]
    directory: Path


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An open checkpoint. Its tensors may be read from any thread, through the methods here only."""

    root: Path
    name: str  # the folder's
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]  # {} when absent
    tensors: Mapping[str, TensorInfo]  # those of the adapter folders are not among them
    adapters: Mapping[str, AdapterFolder]
    tokenizer_json: bytes  # one JSON object; what it holds is not checked
    tokenizer_config: Mapping[str, Any]  # {} when absent
    chat_template: str | None
    licence_text: str | None
    fingerprint: str  # hex SHA-256, see `_Folder.fingerprint`
    _weights: dict[Path, SourceFile] = field(repr=False)

    @classmethod
    def open(cls, root: Path) -> Checkpoint:
        """Check a directory: every small file, and every safetensors header against its file's size.

        Raises:
            CheckpointError: the first thing that is missing, damaged or contradictory.
        """
        refuse_non_directory(root)
        with ExitStack() as on_error:
            folder = _Folder(root)
            on_error.callback(folder.close)
            config = folder.json(CONFIG)
            tensors = _read_weights(folder)
            tokenizer_json = folder.raw(TOKENIZER, _LARGE_MAX_BYTES)
            parse_json_object(tokenizer_json, shown(root / TOKENIZER))
            tokenizer_config = folder.json("tokenizer_config.json", optional=True)
            made = cls(
                root=root,
                name=root.resolve().name,
                config=config,
                generation_config=folder.json("generation_config.json", optional=True),
                tensors=tensors,
                adapters={n: a for n in ADAPTER_NAMES if (a := _read_adapter(folder, n)) is not None},
                tokenizer_json=tokenizer_json,
                tokenizer_config=tokenizer_config,
                chat_template=_read_template(folder, tokenizer_config),
                licence_text=next((text for n in _LICENCES if (text := folder.text(n)) is not None), None),
                fingerprint=folder.fingerprint(),
                _weights=folder.weights,
            )
            on_error.pop_all()  # from here on `close` is the caller's
        return made

    def rows(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows `start` to `stop` of one of this checkpoint's tensors, widened exactly.

        Returns:
            A new C-contiguous float32 [stop - start, info.cols]. Not a number stays so, with its bits
            when the source is BF16 or F32.

        Raises:
            CheckpointError: the file has changed or cannot be read.
        """
        assert 0 <= start <= stop <= info.rows, "rows outside the tensor"
        out = np.empty((stop - start, info.cols), np.float32)
        if out.size:
            row_bytes = info.nbytes // info.rows
            _read_widened(
                self._weights[info.file], info.offset + start * row_bytes, info.dtype, out.reshape(-1)
            )
        return out

    def read(self, info: TensorInfo) -> npt.NDArray[np.float32]:
        """A whole tensor: new float32 of its full shape. For small ones; `rows` bounds the memory."""
        return self.rows(info, 0, info.rows).reshape(info.shape)

    def close(self) -> None:
        """Give the descriptors back. No read may be under way. Safe to call twice."""
        while self._weights:
            self._weights.popitem()[1].close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Folder:
    """Reads a checkpoint's files by name, keeps the weight files open, and digests all that was read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.weights: dict[Path, SourceFile] = {}
        self._digests: dict[str, str] = {}

    def has(self, name: str) -> bool:
        """Whether there is such an entry; a dangling link is one, and an error once it is read."""
        return os.path.lexists(self.root / name)

    def raw(self, name: str, max_bytes: int = _SMALL_MAX_BYTES) -> bytes:
        """A required file."""
        if not self.has(name):
            raise CheckpointError(f"{shown(self.root)}: has no {name}, expected a Hugging Face checkpoint")
        raw = read_bytes(self.root / name, max_bytes)
        self._digest(name, len(raw), raw)
        return raw

    def json(self, name: str, *, optional: bool = False) -> dict[str, Any]:
        """A file that holds one JSON object; {} when it is optional and absent."""
        if optional and not self.has(name):
            return {}
        return parse_json_object(self.raw(name), shown(self.root / name))

    def text(self, name: str) -> str | None:
        """An optional UTF-8 file."""
        if not self.has(name):
            return None
        try:
            return self.raw(name).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise CheckpointError(f"{shown(self.root / name)}: is not UTF-8 at byte {exc.start}") from None

    def tensors(self, name: str) -> Mapping[str, TensorInfo]:
        """A weight file's checked header; the file stays open for `Checkpoint.rows`."""
        file = SourceFile(self.root / name)
        self.weights[file.path] = file
        header = parse_header(file)
        self._digest(name, file.size, header.raw)
        return header.tensors

    def _digest(self, name: str, size: int, raw: bytes) -> None:
        self._digests[name] = f"{name} {size} {hashlib.sha256(raw).hexdigest()}\n"

    def fingerprint(self) -> str:
        """SHA-256 over name, size and SHA-256 of every file read, by name; of weights only the header's.

        It tells checkpoints apart without reading gigabytes. It does not vouch for the weights.
        """
        lines = (self._digests[name] for name in sorted(self._digests))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def close(self) -> None:
        for file in self.weights.values():
            file.close()


def refuse_non_directory(root: Path) -> None:
    """Raise CheckpointError unless `root` is a directory; the message says what was given instead."""
    where = shown(root)
    try:
        mode = root.stat().st_mode
    except (OSError, ValueError) as exc:
        raise CheckpointError(
            f"{where}: {reason(exc)}, expected a Hugging Face checkpoint directory"
        ) from None
    if stat.S_ISDIR(mode):
        return
    kinds = {".gguf": "a GGUF file", ".safetensors": "one safetensors file", ".onnx": "an ONNX file"}
    kinds |= dict.fromkeys(_PICKLES, "a pickle, which is never loaded")
    kind = kinds.get(root.suffix.lower(), "not a directory")
    raise CheckpointError(f"{where}: is {kind}, expected a Hugging Face checkpoint directory")


def read_weight_map(index: Path) -> dict[str, str]:
    """The `weight_map` of a `model.safetensors.index.json`: tensor name -> name of a file beside the index.

    Raises:
        CheckpointError: unreadable, or a value is not a plain file name.
    """
    return _check_weight_map(read_json_object(index, _LARGE_MAX_BYTES), shown(index))


def _check_weight_map(raw: dict[str, Any], where: str) -> dict[str, str]:
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map is {quoted(weight_map)}, expected an object with tensors")
    for tensor, shard in weight_map.items():
        plain = isinstance(shard, str) and not set(shard) & set("/\\:\0") and shard.isprintable()
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{where}: tensor {quoted(tensor)} is in {quoted(shard)}, "
                "expected the plain name of a .safetensors file"
            )
    return weight_map


def _read_weights(folder: _Folder) -> dict[str, TensorInfo]:
    """All tensors of the model itself, from one file or from the shards that the index names."""
    where = shown(folder.root / INDEX)
    if not folder.has(INDEX):
        if not folder.has(SINGLE):
            _refuse_weightless(folder.root)
        return dict(folder.tensors(SINGLE))
    raw = folder.raw(INDEX, _LARGE_MAX_BYTES)
    weight_map = _check_weight_map(parse_json_object(raw, where), where)
    shards = sorted(set(weight_map.values()))
    if folder.has(SINGLE) and SINGLE not in shards:
        raise CheckpointError(f"{where}: does not name {SINGLE}, which stands beside it: which is meant?")
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        if not folder.has(shard):
            raise CheckpointError(f"{where}: names {quoted(shard)}, which is missing")
        for name, info in folder.tensors(shard).items():
            if name in found:
                other = quoted(found[name].file.name)
                raise CheckpointError(
                    f"{where}: tensor {quoted(name)} is in both {other} and {quoted(shard)}"
                )
            if name not in weight_map:
                raise CheckpointError(f"{where}: does not name tensor {quoted(name)} of {quoted(shard)}")
            found[name] = info
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{where}: tensor {quoted(name)} is not in {quoted(shard)}")
        if found[name].file.name != shard:
            actual = quoted(found[name].file.name)
            raise CheckpointError(f"{where}: tensor {quoted(name)} is not in {quoted(shard)} but in {actual}")
    return found


def _refuse_weightless(root: Path) -> NoReturn:
    """Say why a directory without a readable set of weights is not a checkpoint."""
    wanted = f"expected {SINGLE} or {INDEX}"
    try:
        names = sorted(entry.name for entry in root.iterdir())
    except OSError as exc:
        raise CheckpointError(f"{shown(root)}: cannot be read: {reason(exc)}") from None
    suffixes = {Path(name).suffix.lower() for name in names}
    found = "no weights"
    if "bundle.json" in names:
        found = "bundle.json: it is a model directory, converted already"
    elif ".safetensors" in suffixes:
        found = "*.safetensors without an index"
    elif suffixes & set(_PICKLES):
        found = "weights only as pickles, which are never loaded"
    elif ".gguf" in suffixes:
        found = "weights only as GGUF"
    raise CheckpointError(f"{shown(root)}: has {found}, {wanted}")


def _read_adapter(folder: _Folder, name: str) -> AdapterFolder | None:
    directory = f"{name}-lora"
    if not folder.has(directory):
        return None
    where = folder.root / directory
    refuse_non_directory(where)
    if not folder.has(f"{directory}/{ADAPTER_WEIGHTS}"):
        has_pickle = folder.has(f"{directory}/adapter_model.bin")
        found = "only a pickle, which is never loaded" if has_pickle else f"no {ADAPTER_WEIGHTS}"
        raise CheckpointError(f"{shown(where)}: has {found}, expected {ADAPTER_WEIGHTS}")
    config = folder.json(f"{directory}/{ADAPTER_CONFIG}")
    _check_lora(config, shown(where / ADAPTER_CONFIG))
    return AdapterFolder(name, config, folder.tensors(f"{directory}/{ADAPTER_WEIGHTS}"), where)


def _check_lora(config: Mapping[str, Any], where: str) -> None:
    """A plain LoRA with one rank and one alpha, or a CheckpointError."""

    def refuse(key: str, want: str) -> NoReturn:
        raise CheckpointError(f"{where}: {key} is {quoted(config.get(key))}, expected {want}")

    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if config.get("peft_type") != "LORA":
        refuse("peft_type", "LORA")
    if type(rank) is not int or not 0 < rank <= 1 << 16:
        refuse("r", "a rank from 1")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= 1e9:
        refuse("lora_alpha", "a number above 0")
    is_list = isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    if not is_list and not (isinstance(targets, str) and targets):
        refuse("target_modules", "a pattern or a list of names")
    for key, plain in _PLAIN_LORA.items():
        if config.get(key) and config[key] != plain:
            refuse(key, json.dumps(plain))


def _read_template(folder: _Folder, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template as text: its own file, or the tokenizer configuration's, which may be a list."""
    template = folder.text("chat_template.jinja")
    if template is not None:
        return template
    value = tokenizer_config.get("chat_template")
    if isinstance(value, list):
        if not all(isinstance(v, dict) and {"name", "template"} <= set(v) for v in value):
            raise CheckpointError(
                f"{shown(folder.root / 'tokenizer_config.json')}: chat_template is {quoted(value)}, "
                "expected objects with name and template"
            )
        value = next((v["template"] for v in value if v["name"] == "default"), None)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(
            f"{shown(folder.root / 'tokenizer_config.json')}: chat_template is {quoted(value)}, expected text"
        )
    return value


def _read_widened(file: SourceFile, offset: int, dtype: Dtype, out: npt.NDArray[np.float32]) -> None:
    """Fill `out`, float32 [n] with n > 0, from n little-endian numbers at `offset`.

    The narrow types pass through one small buffer, so that memory is `out` and little more.
    """
    if dtype == "F32":
        file.read_into(out.view(np.uint8).data, offset)
        if sys.byteorder == "big":
            out.byteswap(inplace=True)
        return
    buffer = np.empty(2 * min(out.size, _PIECE), np.uint8)
    for at in range(0, out.size, _PIECE):
        part = out[at : at + _PIECE]
        raw = buffer[: 2 * part.size]
        file.read_into(raw.data, offset + 2 * at)
        if dtype == "BF16":
            bits = part.view(np.uint32)
            np.copyto(bits, raw.view("<u2"))  # two passes over cached memory beat one converting shift
            np.left_shift(bits, np.uint32(16), out=bits)
        else:
            with np.errstate(invalid="ignore"):  # a signalling NaN
                np.copyto(part, raw.view("<f2"))
