# SPDX-License-Identifier: Apache-2.0
"""How large the ONNX files of a model directory will be, and what reading for them takes. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..runtime.spec import TextSpec
from . import genai_config
from .config import ModelConfig
from .decoder_quant import BITS, DecoderQuant, LoraKind
from .encoder_quant import EncoderQuant
from .encoder_tensors import AUDIO, IMAGE, encoder_shapes, original_name
from .mapping import Adapter, Target, TensorMap
from .safetensors_file import TensorInfo

_PAGE = 4096  # bytes; tensors in a data file start on one, and what is not larger stays in the graph
_ITEM_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "int8": 1}
# Bytes of a graph: measured on graphs of 4 and 32 layers, with and without inputs for adapters.
_GRAPH_BYTES, _LAYER_BYTES, _LORA_BYTES = 3000, 3300, 2300
_EMBEDDING_BYTES = 1000
_VISION_BYTES, _VISION_LAYER_BYTES, _HEAD_BYTES = 4000, 4000, 1000
_SPEECH_BYTES, _SPEECH_BLOCK_BYTES = 10_000, 10_000
_ATTENDED = re.compile(r"img_processor.*\.[qkv]_proj\.")  # in vision, int4 leaves these at int8
_GENAI_BYTES, _PAIR_BYTES = 10_000, 900  # what onnxruntime-genai's graphs add to ours, and for each LoRA pair
_PARAMETER_BYTES = 140  # of an adapter file's tensor besides its numbers: table, name, dims, padding


@dataclass(frozen=True, slots=True)
class EncoderCost:
    """The encoders as ONNX graphs, all of them together."""

    quant: EncoderQuant
    count: int  # tensors in the checkpoint
    source_bytes: int  # of these
    nbytes: int  # of the files: an upper estimate, every weight at its type and some for the rest
    vision_graphs: int = 0  # thereof: the graphs themselves, with the tensors that are small
    speech_graphs: int = 0


@dataclass(frozen=True, slots=True)
class OnnxCost:
    """The backbone and its adapters as ONNX."""

    quant: DecoderQuant
    groups: Mapping[str, str]  # tensor group -> its kind
    files: Mapping[str, int]  # file -> bytes, estimated
    source_bytes: int  # what is read for them, each tensor once
    scale_bytes: int  # of the matrix that has the most: in memory until it is written

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def encoder_cost(config: ModelConfig, tensors: Sequence[TensorInfo], quant: EncoderQuant) -> EncoderCost:
    """What the encoders' tensors take, those of layers that do not run left out: nobody reads them."""
    if config.vision is None or config.audio is None:
        return EncoderCost(quant, len(tensors), 0, 0)
    unused = [
        f"img_processor.encoder.layers.{n}."
        for n in range(config.vision.n_used_layers, config.vision.n_layers)
    ]
    unused += ["img_processor.head.", "img_processor.post_layernorm."]
    shapes = encoder_shapes(config.vision, config.audio, config.text.d_model)
    original = config.layout == "phi4mm"
    used = {
        original_name(name) if original else name: _encoder_tensor(name, shape, quant)
        for name, shape in shapes.items()
        if not name.startswith(tuple(IMAGE + part for part in unused))
    }
    source = sum(t.nbytes for t in tensors if t.name in used)
    heads = config.vision.n_heads if quant == "int8" else 0  # int8 takes two heads at a time
    vision = _VISION_BYTES + config.vision.n_used_layers * (_VISION_LAYER_BYTES + heads * _HEAD_BYTES)
    speech = _SPEECH_BYTES + config.audio.n_blocks * _SPEECH_BLOCK_BYTES
    vision += sum(n for name, sizes in used.items() if name.startswith(IMAGE) for n in sizes if n <= _PAGE)
    speech += sum(n for name, sizes in used.items() if name.startswith(AUDIO) for n in sizes if n <= _PAGE)
    data = sum(_paged(n) for sizes in used.values() for n in sizes if n > _PAGE)
    return EncoderCost(quant, len(tensors), source, vision + speech + data, vision, speech)


def _encoder_tensor(name: str, shape: tuple[int, ...], quant: EncoderQuant) -> tuple[int, ...]:
    """Bytes of one tensor and its scales: `write_onnx_vision` and `write_onnx_speech` say which is what."""
    rows, values = shape[0], math.prod(shape)
    columns = values // rows
    whole = name.startswith(IMAGE) and ".layers." not in name  # embeddings and projector
    taps = math.prod(shape[2:])
    if len(shape) == 1 or name.endswith("feature_extensor") or "bias_layer" in name:
        kind = "fp32"
    elif whole:
        kind = "fp32" if quant == "fp32" else "fp16"
    elif taps > 1:
        kind = "fp32"  # a convolution that is none of one tap
    elif quant == "int4" and (
        (".encoder.layers." not in name and ".encoders." not in name) or _ATTENDED.search(name)
    ):
        kind = "int8"
    else:
        kind = quant
    if kind == "int4":
        blocks = rows * -(-columns // 32)
        return 16 * blocks, 4 * blocks
    return (values * _ITEM_BYTES[kind], 4 * rows) if kind == "int8" else (values * _ITEM_BYTES[kind],)


def _paged(n: int) -> int:
    return -(-n // _PAGE) * _PAGE


def onnx_cost(
    text: TextSpec,
    tensors: TensorMap,
    adapters: Iterable[Adapter],
    quant: DecoderQuant,
    encoders: EncoderCost,
) -> OnnxCost:
    """What `onnx_backbone` will write.

    Args:
        adapters: those written as files of their own; none if one is merged into the backbone.
    """
    adapters = tuple(adapters)
    infos = [info for _, info in tensors.text if info is not None]
    infos += [info for adapter in adapters for pair in adapter.pairs for info in (pair.a, pair.b)]
    weights = [n for target, info in tensors.text if info is not None for n in _stored(target, quant)]
    graph = _GRAPH_BYTES + text.n_layers * (_LAYER_BYTES + bool(adapters) * _LORA_BYTES)
    graph += sum(n for n in weights if n <= _PAGE)
    files = {"model.onnx": graph, "embedding.onnx": _EMBEDDING_BYTES, "decoder.onnx": graph}
    rope = text.rope
    rows = text.context_length + (rope.original_context if rope.is_long_rope else 0)
    weights += 2 * [4 * rows * rope.dims // 2]
    files["model.onnx.data"] = sum(_paged(n) for n in weights if n > _PAGE)
    for adapter in adapters:
        files[f"adapter-{adapter.name}.onnx_adapter"] = _adapter(adapter, quant.lora)
    files |= {genai_config.CONFIG: 2500, genai_config.TOKENIZER_CONFIG: 2000}
    if encoders.nbytes:  # onnxruntime-genai's own graphs: ours joined, over the same data
        n_pairs = sum(len(adapter.pairs) for adapter in adapters)
        files[genai_config.EMBEDDING] = _EMBEDDING_BYTES + _GENAI_BYTES
        files[genai_config.DECODER] = graph + n_pairs * _PAIR_BYTES + _GENAI_BYTES
        files[genai_config.VISION] = encoders.vision_graphs + _GENAI_BYTES
        files[genai_config.SPEECH] = encoders.speech_graphs + _GENAI_BYTES
        files |= {genai_config.VISION_PROCESSOR: 2000, genai_config.SPEECH_PROCESSOR: 2000}
    blocked = [math.prod(target.shape) // quant.block for target, _ in tensors.text if len(target.shape) == 2]
    groups: dict[str, str] = {
        t.group: quant.of(t.group) if len(t.shape) == 2 else "fp32" for t, info in tensors.text if info
    }
    return OnnxCost(quant, groups, files, sum(i.nbytes for i in infos), 4 * max(blocked))


def _stored(target: Target, quant: DecoderQuant) -> tuple[int, ...]:
    """Bytes of each tensor that one of the backbone's becomes."""
    values = math.prod(target.shape)
    kind = quant.of(target.group) if len(target.shape) == 2 else "fp32"
    if kind in BITS:
        return values * BITS[kind] // 8, 4 * (values // quant.block)
    return (values * _ITEM_BYTES[kind],)


def _adapter(adapter: Adapter, kind: LoraKind) -> int:
    size = 0
    for pair in adapter.pairs:
        for info in (pair.a, pair.b):
            size += info.rows * info.cols * _ITEM_BYTES[kind] + _PARAMETER_BYTES
        size += (4 * adapter.rank + _PARAMETER_BYTES) if kind == "int8" else 0
    return size
