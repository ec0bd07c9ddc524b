# SPDX-License-Identifier: Apache-2.0
"""Full-size encoders with random weights against transformers: fp32 graphs, float32 torch, eager attention.

    pip install '.[reference]'
    python -m tests.tools.make_random_checkpoint --shape phi4-multimodal --out CHECKPOINT
    python -m tests.tools.check_full_size CHECKPOINT

Prints the largest difference of a row relative to the row's norm, for a picture's crop and a clip. The
checkpoint is random, so this is about shapes, orders and names at full width, not about meaning.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import Phi4MultimodalAudioConfig, Phi4MultimodalVisionConfig
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import (
    Phi4MultimodalAudioModel,
    Phi4MultimodalVisionModel,
)

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.config import read_config
from pocketphi.convert.encoder_tensors import original_name
from pocketphi.convert.write_onnx_speech import write_speech
from pocketphi.convert.write_onnx_vision import write_vision
from pocketphi.runtime.onnx_session import OnnxSession

EXTEND = "model.embed_tokens_extend."
VISION, AUDIO = f"{EXTEND}image_embed.img_processor.", f"{EXTEND}audio_embed.encoder."


def load(module: torch.nn.Module, source: Checkpoint, prefix: str) -> torch.nn.Module:
    """Give a module the checkpoint's tensors; every one of its own must be there."""
    state = {}
    for name in module.state_dict():
        info = source.tensors[original_name(prefix + name)]
        state[name] = torch.from_numpy(source.read(info))
    module.load_state_dict(state)
    return module.eval()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float((np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    a = parser.parse_args()
    rng = np.random.default_rng(1)
    with Checkpoint.open(a.checkpoint) as source, tempfile.TemporaryDirectory() as work:
        config = read_config(source.config, "config.json")
        out = Path(work)
        write_vision(out, source, config, "fp32")
        write_speech(out, source, config, "fp32")

        vision = Phi4MultimodalVisionModel(
            Phi4MultimodalVisionConfig(attn_implementation="eager", _attn_implementation="eager")
        )
        load(vision, source, VISION)
        pixels = rng.uniform(-1, 1, (1, 3, 448, 448)).astype(np.float32)
        mask = torch.ones(1, 32, 32, dtype=torch.bool)
        hidden = vision(torch.from_numpy(pixels), patch_attention_mask=mask, output_hidden_states=True)
        layer = hidden.hidden_states[-2].reshape(1, 32, 32, -1).permute(0, 3, 1, 2)
        theirs = torch.nn.functional.avg_pool2d(layer, 2).permute(0, 2, 3, 1).reshape(256, -1).numpy()
        tower = OnnxSession(
            out / "vision.onnx", 2, {"patches": 3, "position_ids": 1, "keys": 1, "grid": 1}, "features"
        )
        patches = pixels.reshape(1, 3, 32, 14, 32, 14).transpose(0, 2, 4, 1, 3, 5).reshape(1, 1024, 588)
        every = np.arange(1024)
        ours = tower.run(
            patches=np.ascontiguousarray(patches), position_ids=every, keys=every, grid=np.array([16, 16])
        )
        print(f"vision: {distance(ours, theirs):.2e}")

        audio = Phi4MultimodalAudioModel(
            Phi4MultimodalAudioConfig(
                num_attention_heads=16, bias_max_distance=500, _attn_implementation="eager"
            )
        )
        load(audio, source, AUDIO)
        features = rng.uniform(0, 10, (1, 998, 80)).astype(np.float32)
        theirs = audio(torch.from_numpy(features), mask=None)[0].numpy()
        tokens = OnnxSession(out / "speech-front.onnx", 2, {"features": 3}, "tokens").run(features=features)
        ours = OnnxSession(out / "speech.onnx", 2, {"tokens": 2}, "hidden").run(tokens=tokens)
        print(f"speech: {distance(ours, theirs):.2e}")


if __name__ == "__main__":
    main()
