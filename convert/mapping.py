# SPDX-License-Identifier: Apache-2.0
"""Which source tensor becomes which output tensor: pure tables derived from the configuration.

Every tensor of the checkpoint is accounted for. One that is unknown, missing or misshapen is an
error that names it; duplicates were refused by the reader. Nothing is split, permuted or transposed:
llama.cpp's `phi3` takes the fused projections as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..runtime.errors import CheckpointError, TensorShapeError
from ..runtime.spec import ADAPTER_NAMES, AdapterName, TextSpec
from .checkpoint import AdapterFolder
from .config import MAX_RANK, LoraSpec, ModelConfig
from .encoder_tensors import encoder_shapes, original_name
from .fields import Fields
from .safetensors_file import TensorInfo

Group = Literal["token_embd", "output", "attn_qkv", "attn_output", "ffn_up", "ffn_down", "norm", "rope"]
Shape = tuple[int, ...]

GROUPS: tuple[Group, ...] = (
    "token_embd",
    "output",
    "attn_qkv",
    "attn_output",
    "ffn_up",
    "ffn_down",
    "norm",
    "rope",
)

# GGUF name within a block -> source name within a layer. ffn_up holds gate rows, then up rows.
LINEARS: Mapping[Group, str] = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the backbone."""

    name: str  # in the GGUF file
    group: Group
    layer: int | None
    shape: Shape  # PyTorch order: [rows, columns] or [columns]
    source: str | None  # in the checkpoint's native layout; None for rope factors
    values: tuple[float, ...] = ()  # the rope factors, from the configuration


@dataclass(frozen=True, slots=True)
class LoraPair:
    """A and B of one linear: A float [rank, in], B float [out, rank]."""

    target: str  # the GGUF name of the weight it adds to
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA over every linear of every layer."""

    name: AdapterName
    rank: int
    alpha: float
    pairs: tuple[LoraPair, ...]


@dataclass(frozen=True, slots=True)
class TensorMap:
    """Where everything goes."""

    text: tuple[tuple[Target, TensorInfo | None], ...]  # None: the target holds its own values
    adapters: Mapping[AdapterName, Adapter]
    encoders: tuple[TensorInfo, ...]  # accounted for; written with the multimodal part
    tied_head: TensorInfo | None  # an lm_head.weight beside a tied embedding: must equal it
    notes: tuple[str, ...]


def linear_shapes(text: TextSpec) -> dict[Group, Shape]:
    """[out, in] of each linear of a layer."""
    return {
        "attn_qkv": (text.d_q + 2 * text.d_kv, text.d_model),
        "attn_output": (text.d_model, text.d_q),
        "ffn_up": (2 * text.d_ff, text.d_model),
        "ffn_down": (text.d_model, text.d_ff),
    }


def text_targets(text: TextSpec) -> list[Target]:
    """The backbone's tensors in model order, with their native source names."""
    wide: Shape = (text.d_model,)
    targets = [
        Target(
            "token_embd.weight",
            "token_embd",
            None,
            (text.vocab_size, text.d_model),
            "model.embed_tokens.weight",
        )
    ]
    for kind, factors in (("long", text.rope.long_factor), ("short", text.rope.short_factor)):
        if factors is not None:
            name = f"rope_factors_{kind}.weight"
            targets.append(Target(name, "rope", None, (len(factors),), None, factors))
    shapes = linear_shapes(text)
    for n in range(text.n_layers):
        block, layer = f"blk.{n}.", f"model.layers.{n}."

        def linear(group: Group, n: int = n, block: str = block, layer: str = layer) -> Target:
            return Target(
                f"{block}{group}.weight", group, n, shapes[group], f"{layer}{LINEARS[group]}.weight"
            )

        def norm(name: str, source: str, n: int = n, block: str = block, layer: str = layer) -> Target:
            return Target(f"{block}{name}.weight", "norm", n, wide, f"{layer}{source}.weight")

        targets += [
            norm("attn_norm", "input_layernorm"),
            linear("attn_qkv"),
            linear("attn_output"),
            norm("ffn_norm", "post_attention_layernorm"),
            linear("ffn_up"),
            linear("ffn_down"),
        ]
    targets.append(Target("output_norm.weight", "norm", None, wide, "model.norm.weight"))
    if not text.tied_head:
        targets.append(
            Target("output.weight", "output", None, (text.vocab_size, text.d_model), "lm_head.weight")
        )
    return targets


def source_name(target: Target, config: ModelConfig) -> str:
    """A backbone tensor's name in this checkpoint's layout."""
    assert target.source is not None
    if config.layout == "phi4mm" and target.group in LINEARS:
        return target.source.removesuffix(".weight") + ".base_layer.weight"
    return target.source


def encoder_names(config: ModelConfig) -> dict[str, Shape]:
    """Encoder tensors, by their names in this checkpoint's layout."""
    if config.vision is None or config.audio is None:
        return {}
    shapes = encoder_shapes(config.vision, config.audio, config.text.d_model)
    return {original_name(k): v for k, v in shapes.items()} if config.layout == "phi4mm" else shapes


def lora_names(text: TextSpec, adapter: str, rank: int) -> dict[str, Shape]:
    """A and B of one adapter, by their names in the original layout."""
    names: dict[str, Shape] = {}
    for n in range(text.n_layers):
        for group, (out, inner) in linear_shapes(text).items():
            stem = f"model.layers.{n}.{LINEARS[group]}"
            names[f"{stem}.lora_A.{adapter}.weight"] = (rank, inner)
            names[f"{stem}.lora_B.{adapter}.weight"] = (out, rank)
    return names


def expected(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor that the main files must hold, name -> shape."""
    names = {source_name(t, config): t.shape for t in text_targets(config.text) if t.source is not None}
    names.update(encoder_names(config))
    for adapter, spec in config.lora.items():
        names.update(lora_names(config.text, adapter, spec.rank))
    return names


def map_tensors(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    folders: Mapping[str, AdapterFolder],
    where: Path,
) -> TensorMap:
    """Match a checkpoint's tensors with what its configuration implies.

    Raises:
        CheckpointError: a tensor is unknown or missing, an adapter's configuration is not supported.
        TensorShapeError: a tensor has another shape.
    """
    wanted = expected(config)
    head = tensors.get("lm_head.weight") if config.text.tied_head else None
    if head is not None:
        wanted["lm_head.weight"] = (config.text.vocab_size, config.text.d_model)
    _compare(tensors, wanted, where)
    text = tuple(
        (t, None if t.source is None else tensors[source_name(t, config)]) for t in text_targets(config.text)
    )
    notes: list[str] = []
    adapters: dict[AdapterName, Adapter] = {}
    for name, spec in config.lora.items():
        adapters[name] = _adapter(name, spec, config.text, tensors)
    for name in ADAPTER_NAMES:
        folder = folders.get(name)
        if folder is None:
            continue
        if config.layout == "phi3":
            raise CheckpointError(f"{folder.directory}: a {name} adapter beside a text-only model")
        own = _folder_adapter(name, folder, config.text)
        if name not in adapters:
            adapters[name] = own
        elif (own.rank, own.alpha) != (adapters[name].rank, adapters[name].alpha):
            raise CheckpointError(
                f"{folder.directory}: adapter_config.json says rank {own.rank}, alpha {own.alpha:g}, "
                f"config.json says {adapters[name].rank}, {adapters[name].alpha:g}"
            )
        else:
            notes.append(
                f"{folder.directory.name}/ repeats the {name} adapter of the main files and is not read"
            )
    if config.layout == "phi4_multimodal" and len(adapters) < len(ADAPTER_NAMES):
        missing = " and ".join(n for n in ADAPTER_NAMES if n not in adapters)
        notes.append(
            f"no {missing} adapter found: the model answers text, and only the media it has adapters for"
        )
    encoders = tuple(tensors[name] for name in encoder_names(config))
    return TensorMap(text, adapters, encoders, head, tuple(notes))


def _compare(tensors: Mapping[str, TensorInfo], wanted: Mapping[str, Shape], where: Path) -> None:
    """Exactly the wanted names, each with its shape. Unknown names first: they say most about a mix-up."""
    for name, info in tensors.items():
        if name not in wanted:
            raise CheckpointError(
                f"{info.file}: tensor {_short(name)} is not part of the model in config.json"
            )
    missing = [name for name in wanted if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing{more}")
    for name, shape in wanted.items():
        info = tensors[name]
        if info.shape != shape:
            raise TensorShapeError(name, got=info.shape, want=shape, file=str(info.file))


def _short(name: str) -> str:
    text = repr(name)
    return text if len(text) <= 120 else text[:119] + "…"


def _adapter(name: AdapterName, spec: LoraSpec, text: TextSpec, tensors: Mapping[str, TensorInfo]) -> Adapter:
    """Pair up A and B under their original-layout names; they are all there and well-shaped."""
    pairs = []
    for n in range(text.n_layers):
        for group, source in LINEARS.items():
            stem = f"model.layers.{n}.{source}"
            a, b = (tensors[f"{stem}.lora_{part}.{name}.weight"] for part in "AB")
            pairs.append(LoraPair(f"blk.{n}.{group}.weight", a, b))
    return Adapter(name, spec.rank, spec.alpha, tuple(pairs))


_FOLDER_KEY = re.compile(
    r"(?:base_model\.model\.)?"
    r"(model\.layers\.\d+\.[a-z_]+\.[a-z_]+)"
    r"(?:\.base_layer)?"
    r"\.lora_(A|B)"
    r"(?:\.(vision|speech|default))?"
    r"\.weight"
)


def _folder_adapter(name: AdapterName, folder: AdapterFolder, text: TextSpec) -> Adapter:
    """An adapter folder in any of the spellings PEFT and the conversion scripts have used."""
    spec = _folder_spec(folder)
    wanted = lora_names(text, name, spec.rank)
    found: dict[str, TensorInfo] = {}
    for key, info in folder.tensors.items():
        match = _FOLDER_KEY.fullmatch(key)
        plain = f"{match[1]}.lora_{match[2]}.{name}.weight" if match else ""
        if match is None or match[3] not in (None, "default", name) or plain not in wanted:
            raise CheckpointError(f"{info.file}: tensor {_short(key)} is not part of a {name} adapter")
        if plain in found:
            raise CheckpointError(f"{info.file}: tensor {_short(key)} repeats {found[plain].name!r}")
        if info.shape != wanted[plain]:
            raise TensorShapeError(key, got=info.shape, want=wanted[plain], file=str(info.file))
        found[plain] = info
    for plain in wanted:
        if plain not in found:
            raise CheckpointError(
                f"{folder.directory}: tensor {plain.replace(f'.{name}.', '.')!r} is missing"
            )
    return _adapter(name, spec, text, found)


def _folder_spec(folder: AdapterFolder) -> LoraSpec:
    """Rank and alpha; the reader has refused what a plain LoRA cannot express."""
    own = Fields(folder.config, str(folder.directory / "adapter_config.json"))
    return LoraSpec(own.count("r", 1, MAX_RANK), own.positive("lora_alpha"))
