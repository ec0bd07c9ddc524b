# SPDX-License-Identifier: Apache-2.0
"""What every recipe would make of a checkpoint: sizes only, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..runtime.spec import Backbone, TextSpec
from .conversion import TOKENIZER, prepare
from .decoder_quant import DecoderKind, LoraKind, named_decoder_quant
from .encoder_quant import EncoderQuant, named_quant
from .encoder_tensors import AUDIO, IMAGE
from .mapping import map_tensors
from .options import Options
from .recipe import RECIPES, LoraQuant, named_lora
from .work_plan import Choices, Plan, adapter_file, make_plan, padded

# Adapters and encoders, small to large, in pairs that go together. fp32 would take the memory of fp16.
_PAIRS: tuple[tuple[LoraQuant, EncoderQuant], ...] = (("Q4_0", "int4"), ("Q8_0", "int8"), ("F16", "fp16"))
_ONNX_PAIRS: tuple[tuple[LoraKind, EncoderQuant], ...] = (
    ("int8", "int4"),
    ("fp16", "int8"),
    ("fp16", "fp16"),
)
_ONNX_KINDS: tuple[DecoderKind, ...] = ("int4", "int8", "fp16")
_PLAIN = "int8"  # the pair of a model that has neither
# Bytes of a weight in graphs of the full size: some tensors keep more bits than the type says.
_BYTES: Mapping[str, Mapping[str, float]] = {
    "vision": {"int8": 1.045, "int4": 0.777, "fp16": 2.0, "fp32": 4.0},
    "speech": {"int8": 1.01, "int4": 0.663, "fp16": 2.0, "fp32": 4.0},
}
_POOL = ".img_processor.head."  # SigLIP's pooling, which the model has no use for


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to convert a checkpoint; sizes in bytes."""

    recipe: str  # of the ONNX backbone its kind
    lora_quant: str
    encoders: str
    disk: int  # of the whole model directory, an upper estimate
    backbone: int
    quant: Mapping[str, str]  # tensor group -> ggml types, or what `bundle.OnnxInfo` has
    adapter_bytes: Mapping[str, int]
    encoder_bytes: Mapping[str, int]
    engine: Backbone = "gguf"


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint and everything that could be made of it, recipes from few bits to many."""

    name: str
    text: TextSpec
    tokenizer: int  # bytes of tokenizer.json
    candidates: tuple[Candidate, ...]


def survey(root: Path, backbone: Backbone = "gguf") -> Survey:
    """Check a checkpoint and plan every conversion to a backbone that is worth having.

    Raises:
        CheckpointError: as `convert.plan`.
    """
    with prepare(root, Options()) as work:
        tensors = map_tensors(work.config, work.source.tensors, work.source.adapters, root)
        files = dict(work.plan.other_files)
        values = {
            name: sum(
                t.rows * t.cols for t in tensors.encoders if t.name.startswith(prefix) and _POOL not in t.name
            )
            for name, prefix in (("vision", IMAGE), ("speech", AUDIO))
        }
        choices = _onnx_choices() if backbone == "onnx" else _gguf_choices()
        if not (tensors.adapters or tensors.encoders):
            choices = (one for one in choices if one.encoders == _PLAIN)
        found = tuple(
            _candidate(make_plan(work.plan.name, work.config, tensors, one, files, ()), values)
            for one in choices
        )
        return Survey(work.plan.name, work.config.text, files[TOKENIZER], found)


def _gguf_choices() -> Iterator[Choices]:
    for recipe in RECIPES.values():
        for lora, encoders in _PAIRS:
            yield Choices(recipe, named_lora(lora), None, 1, named_quant(encoders))


def _onnx_choices() -> Iterator[Choices]:
    recipe, lora = next(iter(RECIPES.values())), named_lora("Q8_0")  # of a GGUF, which there is none
    for kind in _ONNX_KINDS:
        for onnx_lora, encoders in _ONNX_PAIRS:
            quant = named_decoder_quant(kind, onnx_lora)
            yield Choices(recipe, lora, None, 1, named_quant(encoders), ("onnx",), quant)


def _candidate(plan: Plan, values: Mapping[str, int]) -> Candidate:
    """`values`: how many weights each encoder has."""
    kind, adapters = plan.encoders.quant, dict[str, int]()
    if plan.onnx is not None:
        size, lora = plan.onnx.files, str(plan.onnx.quant.lora)
        backbone, quant = size["model.onnx.data"], plan.onnx.quant.kinds()
        adapters = {a.name: size[f"adapter-{a.name}.onnx_adapter"] for a in plan.adapters}
    else:
        lora, quant = plan.lora_quant, plan.quant()
        names = [plan.backbone, *(adapter_file(a.name, plan.lora_quant) for a in plan.adapters)]
        backbone, *of_adapters = (sum(padded(s.nbytes) for s in plan.steps_of(name)) for name in names)
        adapters = {a.name: n for a, n in zip(plan.adapters, of_adapters, strict=True)}
    return Candidate(
        recipe=plan.recipe_name,
        lora_quant=lora,
        encoders=kind,
        disk=plan.total_bytes,
        backbone=backbone,
        quant=quant,
        adapter_bytes=adapters,
        encoder_bytes={name: int(_BYTES[name][kind] * n) for name, n in values.items() if n},
        engine=plan.backbones[0],
    )
