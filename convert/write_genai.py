# SPDX-License-Identifier: Apache-2.0
"""Writes what onnxruntime-genai needs besides our own runtime's files, so that it opens the same directory.

Text models need JSON files only: genai's `phi3` takes model.onnx as it is. The multimodal family has four
graphs besides, whose weights are the other graphs' and the adapters'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..runtime.bundle import BundleFile
from . import genai_config as configs
from .checkpoint import Checkpoint
from .config import ModelConfig
from .genai_decoder import Tensors, decoder, embedding
from .genai_speech import speech
from .genai_vision import vision
from .mapping import Adapter
from .onnx_adapter_file import adapter_tensors
from .output import write_file
from .vocabulary import Vocabulary

MAX_CROPS = 36  # of a picture: `dynamic_hd` of the published processor
PLACEHOLDERS = {"<|endoftext10|>": 200_010, "<|endoftext11|>": 200_011}  # picture, sound; genai's own ids
VISION_GRAPHS = {"tower": "vision.onnx", "projector": "vision-projector.onnx"}
SPEECH_GRAPHS = {
    "front": "speech-front.onnx",
    "trunk": "speech.onnx",
    "speech-projector": "speech-projector.onnx",
    "vision-projector": "speech-vision-projector.onnx",
}


def write_genai(
    directory: Path,
    source: Checkpoint,
    config: ModelConfig,
    *,
    vocabulary: Vocabulary,
    stop_ids: Sequence[int],
    adapters: Sequence[Adapter],
    producer: str = "",
) -> list[BundleFile]:
    """Write them into `directory`, which holds the decoder graphs, the adapters and the encoders already.

    Args:
        stop_ids: as in bundle.json.
        adapters: those that `directory` has as .onnx_adapter files.
        producer: goes into the graphs' metadata.

    Raises:
        OutputError: a file cannot be written.
    """
    text = config.text
    multimodal = config.vision is not None and config.audio is not None
    made = {
        configs.CONFIG: configs.genai_config(text, vocabulary, stop_ids, multimodal=multimodal),
        configs.TOKENIZER_CONFIG: configs.tokenizer_config(
            vocabulary, source.tokenizer_config, source.chat_template, text.context_length
        ),
    }
    if multimodal:
        made |= {configs.VISION_PROCESSOR: configs.vision_processor(MAX_CROPS)}
        made |= {configs.SPEECH_PROCESSOR: configs.speech_processor()}
    files = [write_file(directory, name, data) for name, data in made.items()]
    if multimodal:
        files += _graphs(directory, config, vocabulary, adapters, producer)
    return files


def _graphs(
    directory: Path, config: ModelConfig, vocabulary: Vocabulary, adapters: Sequence[Adapter], producer: str
) -> list[BundleFile]:
    """The four graphs of the multimodal family."""
    assert config.audio is not None
    text = config.text
    loras: dict[str, Tensors] = {
        a.name: adapter_tensors(directory / f"adapter-{a.name}.onnx_adapter") for a in adapters
    }
    image, audio = (vocabulary.added.get(token, own) for token, own in PLACEHOLDERS.items())
    graphs = (
        embedding(directory, text, image, audio),
        decoder(directory, text, loras),
        vision(directory, VISION_GRAPHS, text.d_model),
        speech(directory, SPEECH_GRAPHS, config.audio.n_mels, text.d_model),
    )
    return [graph.write(directory, producer) for graph in graphs]
