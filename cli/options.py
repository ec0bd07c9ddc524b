# SPDX-License-Identifier: Apache-2.0
"""The flags that several commands take: each is one type, with its name and its help."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Adapter(str, Enum):
    """Adapters by name; none is the base model."""

    none = "none"
    vision = "vision"
    speech = "speech"


class Reasoning(str, Enum):
    """What to do with what a reasoning model thinks aloud."""

    show = "show"
    hide = "hide"


class Engine(str, Enum):
    """A model directory's backbones, by what they are stored as."""

    gguf = "gguf"
    onnx = "onnx"


class Provider(str, Enum):
    """What ONNX Runtime computes with; a build of it has some of them."""

    cpu = "cpu"
    cuda = "cuda"
    coreml = "coreml"
    dml = "dml"
    qnn = "qnn"
    webgpu = "webgpu"


ModelDir = Annotated[
    Path | None,
    typer.Option(
        "-m", "--model", envvar="POCKETPHI_MODEL", help="Model directory [default: the built-in phi4-nano]."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
System = Annotated[str | None, typer.Option("-sys", "--system", help="System prompt.")]
Predict = Annotated[
    int, typer.Option("-n", "--predict", min=-1, help="Most tokens to write; -1: until it stops.")
]
Temp = Annotated[float, typer.Option("--temp", help="Temperature; 0: greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k most probable tokens; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the most probable tokens that sum to p.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens below p times the most probable one.")]
RepeatPenalty = Annotated[float, typer.Option("--repeat-penalty", help="Over the last 64 tokens; 1: off.")]
FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", help="For each time that the answer has a token; 0: off.")
]
PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="For tokens that the answer has; 0: off.")
]
Seed = Annotated[int, typer.Option("-s", "--seed", min=-1, help="-1: a new one each time.")]
CtxSize = Annotated[
    int, typer.Option("-c", "--ctx-size", help="Most tokens of a conversation; 0: the model's own.")
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", help="[default: the physical cores]")]
GpuLayers = Annotated[int, typer.Option("-ngl", "--gpu-layers", help="Layers for the GPU; -1: all.")]
KvType = Annotated[str, typer.Option("--cache-type", help="KV cache: f32, f16, q8_0 or q4_0.")]
AnyKvType = Annotated[
    str | None,
    typer.Option("--cache-type", help="KV cache: f32, f16, q8_0 or q4_0 [default: f16]; of onnx, f32 alone."),
]
BackboneOption = Annotated[
    Engine | None,
    typer.Option(
        "--backbone",
        help="Which one runs, if the model has both: llama.cpp's or ONNX Runtime's [default: gguf].",
    ),
]
ProviderOption = Annotated[
    Provider,
    typer.Option("--provider", help="What ONNX Runtime runs the onnx backbone on; only cpu is tested."),
]
AdapterOption = Annotated[Adapter, typer.Option("--adapter", help="Read the text through this LoRA.")]
Schema = Annotated[str | None, typer.Option("-j", "--json-schema", help="JSON schema the answer must match.")]
Grammar = Annotated[str | None, typer.Option("--grammar", help="GBNF grammar the answer must match.")]
GrammarFile = Annotated[Path | None, typer.Option("--grammar-file", help="The same, from a file.")]
Tools = Annotated[Path | None, typer.Option("--tools", help="JSON list of tools the model may call.")]
Think = Annotated[Reasoning, typer.Option("--reasoning", help="Show or hide <think>…</think>.")]
Images = Annotated[list[Path] | None, typer.Option("--image", help="A picture; again for more.")]
Audio = Annotated[
    list[str] | None, typer.Option("--audio", help="A clip; - reads WAV or raw s16le at 16 kHz from stdin.")
]
Mic = Annotated[bool, typer.Option("--mic", help="Ask by voice: speak, then pause.")]
Device = Annotated[
    str | None, typer.Option("--device", help="Microphone: its number, or its name or a part of it.")
]
Video = Annotated[Path | None, typer.Option("--video", help="A video, as evenly spaced frames.")]
Frames = Annotated[int, typer.Option("--frames", help="Of the video, 1 to 64.")]
Camera = Annotated[int | None, typer.Option("--camera", help="One frame of this camera, from 0.")]
MaxCrops = Annotated[
    int, typer.Option("--max-crops", help="448-pixel squares of one picture, 1 to 36; fewer are faster.")
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="llama.cpp's log on stderr.")]
