# SPDX-License-Identifier: Apache-2.0
"""What a conversion will write: every tensor with its type and size, before any work. Pure; prints itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..runtime.errors import InputError
from ..runtime.spec import ADAPTER_NAMES, AdapterName, Backbone, TextSpec
from .config import ModelConfig
from .decoder_quant import DecoderQuant
from .encoder_quant import EncoderQuant
from .ggml_types import GgmlType
from .mapping import GROUPS, Adapter, Shape, TensorMap
from .onnx_sizes import EncoderCost, OnnxCost, encoder_cost, onnx_cost
from .recipe import Choice, LoraQuant, Recipe, choose, choose_lora
from .safetensors_file import TensorInfo

ALIGNMENT = 32  # bytes; GGUF_DEFAULT_ALIGNMENT: every tensor starts at a multiple of it
CHUNK_VALUES = 1 << 19  # weights in one unit of work, at least one row: 2 MiB as float32
LOAD_CONTEXT = 4096  # tokens of KV cache in `load_ram_bytes`
_KV_BYTES = {"gguf": 2, "onnx": 4}  # float16, float32


@dataclass(frozen=True, slots=True)
class Merge:
    """An adapter pair added to a weight before it is quantized: W + scale · B A, in float32."""

    scale: float  # alpha / rank
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of one output file."""

    file: str
    tensor: str
    group: str  # a mapping.Group, "lora_a" or "lora_b"
    type: GgmlType
    shape: Shape  # PyTorch order: [rows, columns] or [columns]
    source: TensorInfo | None  # None: `values`
    values: tuple[float, ...] = ()
    merge: Merge | None = None
    note: str = ""  # why the type is not the recipe's
    adapter: AdapterName | None = None  # whose tensor; None: the backbone's

    @property
    def imatrix_name(self) -> str:
        """In an importance matrix. All adapters have the same names, so theirs are told apart there."""
        return self.tensor if self.adapter is None else f"{self.adapter}.{self.tensor}"

    @property
    def row_length(self) -> int:
        """Values in a row."""
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data, without padding."""
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.row_length)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names in the checkpoint."""
        if self.source is None:
            return ("config.json",)
        names = (self.source.name,)
        return names if self.merge is None else (*names, self.merge.a.name, self.merge.b.name)


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, ready to run."""

    name: str
    recipe: Recipe
    lora_quant: LoraQuant
    merged: AdapterName | None
    adapters: tuple[Adapter, ...]  # those written as files of their own
    steps: tuple[Step, ...]  # of the GGUF files; none where the backbone is ONNX alone
    other_files: Mapping[str, int]  # file -> bytes, beside the GGUF files
    metadata_bytes: int  # of all GGUF headers: an upper estimate
    ram_bytes: int  # expected peak of the conversion
    load_ram_bytes: int  # to run the result: all weights of a backbone and a KV cache of 4,096 tokens
    encoders: EncoderCost
    notes: tuple[str, ...]
    backbones: tuple[Backbone, ...] = ("gguf",)
    onnx: OnnxCost | None = None  # None: no ONNX backbone

    @property
    def backbone(self) -> str:
        """The GGUF backbone's file name."""
        return backbone_file(self.recipe)

    @property
    def recipe_name(self) -> str:
        """The GGUF backbone's recipe, or where there is none the kind of the ONNX backbone."""
        if self.onnx is None or "gguf" in self.backbones:
            return self.recipe.name
        return self.onnx.quant.name

    @property
    def source_bytes(self) -> int:
        """What a progress bar counts: GGUF tensors as they are written, ONNX weights as they are read."""
        onnx = 0 if self.onnx is None else self.onnx.source_bytes
        return self.tensor_bytes + onnx + self.encoders.source_bytes

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all GGUF tensors, padded."""
        return sum(padded(s.nbytes) for s in self.steps)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        onnx = 0 if self.onnx is None else self.onnx.nbytes
        others = self.metadata_bytes + sum(self.other_files.values())
        return self.tensor_bytes + onnx + self.encoders.nbytes + others

    def steps_of(self, file: str) -> list[Step]:
        """One file's tensors, in their order in it."""
        return [s for s in self.steps if s.file == file]

    def quant(self) -> dict[str, str]:
        """Tensor group -> its ggml types, "Q4_K" or "Q5_K+Q6_K", or of ONNX alone its kind; backbone only."""
        if self.onnx is not None and "gguf" not in self.backbones:
            return dict(self.onnx.groups)
        steps = self.steps_of(self.backbone)
        found = {g: types_of(s for s in steps if s.group == g) for g in GROUPS}
        return {g: types for g, types in found.items() if types}

    def format(self) -> str:
        """The plan as a table for people, lines without a final newline."""
        width = max((len(s.tensor) for s in self.steps), default=0)
        lines = []
        for file in dict.fromkeys(s.file for s in self.steps):
            steps = self.steps_of(file)
            lines += [f"{file}: {len(steps)} tensors, {_size(sum(padded(s.nbytes) for s in steps))}"]
            for s in steps:
                shape = " × ".join(str(n) for n in s.shape)
                line = f"  {s.tensor:<{width}}  {shape:>14}  {s.type.name:<5} {_size(s.nbytes):>10}"
                lines.append(f"{line}  {s.note}".rstrip())
        lines += [f"{file}: {_size(n)}" for file, n in self.other_files.items()]
        if self.onnx is not None:
            lines += [f"{file}: about {_size(n)}" for file, n in self.onnx.files.items()]
        lines += [f"note: {note}" for note in self.notes]
        if self.encoders.count:
            e = self.encoders
            lines.append(f"encoders: {e.count} tensors, {e.quant}, at most {_size(e.nbytes)} as ONNX")
        lines.append(f"total: {_size(self.total_bytes)} on disk")
        lines.append(
            f"memory: {_size(self.ram_bytes)} to convert; to run, {_size(self.load_ram_bytes)} for weights "
            f"and {LOAD_CONTEXT} tokens, beside the program's own"
        )
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as one JSON object, for programs."""
        plain = {
            "name": self.name,
            "backbones": list(self.backbones),
            "recipe": self.recipe_name,
            "quant": self.quant(),
            "merged": self.merged,
            "tensors": [
                {
                    "file": s.file,
                    "tensor": s.tensor,
                    "sources": list(s.sources),
                    "type": s.type.name,
                    "shape": list(s.shape),
                    "bytes": s.nbytes,
                    "note": s.note,
                }
                for s in self.steps
            ],
            "other_files": dict(self.other_files),
            "onnx_files": {} if self.onnx is None else dict(self.onnx.files),
            "total_bytes": self.total_bytes,
            "ram_bytes": self.ram_bytes,
            "load_ram_bytes": self.load_ram_bytes,
            "encoders": {
                "type": self.encoders.quant,
                "count": self.encoders.count,
                "bytes": self.encoders.nbytes,
            },
            "notes": list(self.notes),
        }
        return json.dumps(plain, indent=1, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user chose, checked."""

    recipe: Recipe
    lora_quant: LoraQuant
    merge: AdapterName | None
    threads: int
    encoders: EncoderQuant = "int8"
    backbones: tuple[Backbone, ...] = ("gguf",)
    onnx: DecoderQuant = field(default_factory=DecoderQuant)


def backbone_file(recipe: Recipe) -> str:
    """The backbone's file name."""
    return f"backbone-{recipe.name}.gguf"


def adapter_file(adapter: AdapterName, quant: LoraQuant) -> str:
    """An adapter's file name; "LoRA" at the end is the GGUF naming convention's type."""
    return f"{adapter}-{quant}-LoRA.gguf"


def types_of(steps: Iterable[Step]) -> str:
    """The ggml types of some tensors, from few bits to many: "Q4_K+Q6_K"."""
    types = {s.type.name: s.type for s in steps}
    return "+".join(sorted(types, key=lambda name: types[name].bits))


def padded(nbytes: int) -> int:
    """A tensor's size with the padding after it."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def merges_of(adapter: Adapter | None) -> dict[str, Merge]:
    """What an adapter adds, by the weight's name in the backbone."""
    pairs = () if adapter is None else adapter.pairs
    return {p.target: Merge(adapter.alpha / adapter.rank, p.a, p.b) for p in pairs if adapter is not None}


def make_plan(
    name: str,
    config: ModelConfig,
    tensors: TensorMap,
    choices: Choices,
    other_files: Mapping[str, int],
    notes: tuple[str, ...],
) -> Plan:
    """Join configuration, tensors and recipe.

    Args:
        other_files: name -> bytes of what is written beside the GGUF files; holds "tokenizer.json".
        notes: what the reader found worth saying.

    Raises:
        InputError: an adapter is to be merged that the checkpoint does not have.
    """
    merged = None
    if choices.merge is not None:
        merged = tensors.adapters.get(choices.merge)
        if merged is None:
            raise InputError(f"--merge {choices.merge}: this checkpoint has no {choices.merge} adapter")
    # A merged backbone has one purpose; adapters made for the plain one do not fit it.
    written = () if merged else tuple(tensors.adapters[n] for n in ADAPTER_NAMES if n in tensors.adapters)
    steps: list[Step] = []
    if "gguf" in choices.backbones:
        steps = _backbone(config.text, tensors, choices.recipe, merged)
        for adapter in written:
            steps += _adapter(adapter, choices.lora_quant)
    encoders = encoder_cost(config, tensors.encoders, choices.encoders)
    onnx = None
    if "onnx" in choices.backbones:
        onnx = onnx_cost(config.text, tensors, written, choices.onnx, encoders)
    weights = sum(padded(s.nbytes) for s in steps) or (0 if onnx is None else onnx.nbytes)
    kv = (
        _KV_BYTES[choices.backbones[0]]
        * config.text.kv_values_per_token
        * min(LOAD_CONTEXT, config.text.context_length)
    )
    return Plan(
        name=name,
        recipe=choices.recipe,
        lora_quant=choices.lora_quant,
        merged=choices.merge,
        adapters=written,
        steps=tuple(steps),
        other_files=other_files,
        # Tokens and merges are strings in both; a GGUF string costs 8 bytes more than JSON's quotes.
        metadata_bytes=2 * other_files["tokenizer.json"] + (1 << 16),
        ram_bytes=_ram(steps, onnx, other_files["tokenizer.json"], choices.threads),
        load_ram_bytes=weights + kv,
        encoders=encoders,
        notes=(*notes, *tensors.notes),
        backbones=choices.backbones,
        onnx=onnx,
    )


def _backbone(text: TextSpec, tensors: TensorMap, recipe: Recipe, merged: Adapter | None) -> list[Step]:
    merges = merges_of(merged)
    steps = []
    for target, info in tensors.text:
        choice: Choice = choose(
            recipe,
            target.group,
            target.shape[-1],
            layer=target.layer,
            n_layers=text.n_layers,
            tied_head=text.tied_head,
        )
        steps.append(
            Step(
                file=backbone_file(recipe),
                tensor=target.name,
                group=target.group,
                type=choice.type,
                shape=target.shape,
                source=info,
                values=target.values,
                merge=merges.get(target.name),
                note=choice.note,
            )
        )
    return steps


def _adapter(adapter: Adapter, quant: LoraQuant) -> list[Step]:
    file = adapter_file(adapter.name, quant)
    steps = []
    for pair in adapter.pairs:
        for group, info in (("lora_a", pair.a), ("lora_b", pair.b)):
            choice = choose_lora(quant, info.shape[1])
            tensor = f"{pair.target}.{group}"
            steps.append(
                Step(
                    file=file,
                    tensor=tensor,
                    group=group,
                    type=choice.type,
                    shape=info.shape,
                    source=info,
                    note=choice.note,
                    adapter=adapter.name,
                )
            )
    return steps


def _ram(steps: list[Step], onnx: OnnxCost | None, tokenizer_bytes: int, threads: int) -> int:
    """Expected peak: interpreter and libraries, tokenizer.json as Python objects, and work in flight.

    The first two were measured: 50 MB, and 42 bytes for each of the file's.
    """
    longest = max((s.row_length for s in steps), default=0)
    chunk = 4 * max(CHUNK_VALUES, longest)  # float32
    in_flight = 2 * threads * 2 * chunk  # source and result of each, and as many waiting
    merge = max((4 * math.prod(s.merge.a.shape) for s in steps if s.merge), default=0)
    graphs = 0 if onnx is None else onnx.scale_bytes
    return 50_000_000 + 42 * tokenizer_bytes + in_flight + 2 * merge + graphs


def _size(n: int) -> str:
    """Bytes for people: "2.31 GB", decimal units as disks are sold."""
    value = float(n)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
