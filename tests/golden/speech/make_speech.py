# SPDX-License-Identifier: Apache-2.0
"""Makes speech.npz and speech.json with transformers. Run from the repository's top folder:

    python -m tests.golden.speech.make_speech

needs the `reference` extra. See README.md here for what is recorded.
"""

from __future__ import annotations

import json
import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # before numpy loads

import numpy as np
import torch
import transformers
from transformers import Phi4MultimodalFeatureExtractor, Phi4MultimodalForCausalLM

from pocketphi.runtime.logmel import log_mel

from ... import tiny
from .cases import HERE, LONG, RATE, SHORT, Float32, Int64, samples_of


def main() -> None:
    torch.set_num_threads(1)
    net = Phi4MultimodalForCausalLM.from_pretrained(
        tiny.NANO, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    audio = net.model.embed_tokens_extend.audio_embed
    arrays: dict[str, Float32 | Int64] = {"features": _own_features(samples_of(SHORT[0]))}
    n_tokens = {}
    for name in (*SHORT, *LONG):
        features = log_mel(samples_of(name))
        with torch.no_grad():
            hidden = audio.encoder(torch.from_numpy(features)[None], None)
            heads = {
                "speech": (audio.up_proj_for_speech, audio.down_proj_for_speech),
                "vision": (audio.up_proj_for_vision_speech, audio.down_proj_for_vision_speech),
            }
            out = {key: down(torch.nn.functional.gelu(up(hidden))) for key, (up, down) in heads.items()}
        n = hidden.shape[1]
        rows = _recorded(n)
        arrays[f"{name}/rows"] = rows
        for key, value in (("hidden", hidden), *out.items()):
            arrays[f"{name}/{key}"] = value[0].numpy()[rows]
        n_tokens[name] = n
        print(f"{name}: {features.shape[0]} frames, {n} tokens, {len(rows)} recorded")
    np.savez_compressed(HERE / "speech.npz", **arrays)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    text = json.dumps({"n_tokens": n_tokens, "versions": versions}, indent=1) + "\n"
    (HERE / "speech.json").write_text(text, "utf-8")


def _recorded(n: int) -> Int64:
    """All rows of a short clip; of a long one every 29th, and those around the ends of its blocks."""
    if n < 100:
        return np.arange(n)
    near = [b + d for b in range(0, n + 500, 500) for d in range(-3, 4)]
    return np.unique([r for r in [*range(0, n, 29), *near, n - 2, n - 1] if 0 <= r < n])


def _own_features(samples: Float32) -> Float32:
    out = Phi4MultimodalFeatureExtractor()(samples, sampling_rate=RATE, return_tensors="np")
    return np.asarray(out["audio_input_features"][0], np.float32)


if __name__ == "__main__":
    main()
