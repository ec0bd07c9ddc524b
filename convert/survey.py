# SPDX-License-Identifier: Apache-2.0
"""What every recipe would make of a checkpoint: sizes only, nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..runtime.spec import TextSpec
from .conversion import TOKENIZER, prepare
from .encoder_quant import EncoderQuant, named_quant
from .encoder_tensors import AUDIO, IMAGE
from .mapping import map_tensors
from .options import Options
from .recipe import RECIPES, LoraQuant, named_lora
from .work_plan import Choices, adapter_file, make_plan, padded

# Adapters and encoders, small to large, in pairs that go together. fp32 would take the memory of fp16.
_PAIRS: tuple[tuple[LoraQuant, EncoderQuant], ...] = (("Q4_0", "int4"), ("Q8_0", "int8"), ("F16", "fp16"))
# Bytes of a weight in graphs of the full size: some tensors keep more bits than the type says.
_BYTES: Mapping[str, Mapping[str, float]] = {
    "vision": {"int8": 1.045, "int4": 0.777, "fp16": 2.0, "fp32": 4.0},
    "speech": {"int8": 1.01, "int4": 0.663, "fp16": 2.0, "fp32": 4.0},
}
_POOL = ".img_processor.head."  # SigLIP's pooling, which the model has no use for


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to convert a checkpoint; sizes in bytes."""

    recipe: str
    lora_quant: str
    encoders: str
    disk: int  # of the whole model directory, an upper estimate
    backbone: int
    quant: Mapping[str, str]  # tensor group -> ggml types
    adapter_bytes: Mapping[str, int]
    encoder_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint and everything that could be made of it, recipes from few bits to many."""

    name: str
    text: TextSpec
    tokenizer: int  # bytes of tokenizer.json
    candidates: tuple[Candidate, ...]


def survey(root: Path) -> Survey:
    """Check a checkpoint and plan every conversion that is worth having.

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
        pairs = _PAIRS if tensors.adapters or tensors.encoders else _PAIRS[1:2]
        found = []
        for recipe in RECIPES.values():
            for lora, encoders in pairs:
                choices = Choices(recipe, named_lora(lora), None, 1, named_quant(encoders))
                plan = make_plan(work.plan.name, work.config, tensors, choices, files, ())
                found.append(
                    Candidate(
                        recipe=recipe.name,
                        lora_quant=lora,
                        encoders=encoders,
                        disk=plan.total_bytes,
                        backbone=sum(padded(s.nbytes) for s in plan.steps_of(plan.backbone)),
                        quant=plan.quant(),
                        adapter_bytes={
                            a.name: sum(padded(s.nbytes) for s in plan.steps_of(adapter_file(a.name, lora)))
                            for a in plan.adapters
                        },
                        encoder_bytes={
                            n: int(_BYTES[n][encoders] * count) for n, count in values.items() if count
                        },
                    )
                )
        return Survey(work.plan.name, work.config.text, files[TOKENIZER], tuple(found))
