# SPDX-License-Identifier: Apache-2.0
"""Runs onnxruntime-genai in a process of its own, which it may end: it crashes on some things.

Takes one JSON object on stdin, {"directory", "overlays", "jobs"}, and prints one line of JSON, the results.
It imports nothing of this project: this is what a user of genai writes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime_genai as og


def generator(model: Any, job: dict[str, Any], length: int) -> Any:
    params = og.GeneratorParams(model)
    params.set_search_options(**{"max_length": length + job["new"], **job.get("search", {})})
    return og.Generator(model, params)


def generated(run: Any, count: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count and not run.is_done():
        run.generate_next_token()
        tokens.append(int(run.get_next_tokens()[0]))
    return tokens


def text(model: Any, job: dict[str, Any]) -> Any:
    """Tokens after {"ids"}, with the {"adapter": [file, name]}; or the {"logits"} of the first."""
    run = generator(model, job, len(job["ids"]))
    if "adapter" in job:
        adapters = og.Adapters(model)
        adapters.load(*job["adapter"])
        run.set_active_adapter(adapters, job["adapter"][1])
    run.append_tokens(np.array(job["ids"], np.int32))
    if "logits" in job:
        return run.get_logits().reshape(-1).tolist()
    return generated(run, job["new"])


def inputs(model: Any, job: dict[str, Any]) -> list[list[int]]:
    """Tokens after what the .npz file {"inputs"} holds, and after each of the {"turns"} that follow."""
    found = og.NamedTensors()
    with np.load(job["inputs"]) as file:
        length = file["input_ids"].size + sum(len(turn) + job["new"] for turn in job.get("turns", ()))
        for name in file.files:
            found[name] = np.ascontiguousarray(file[name])
    run = generator(model, job, length)
    run.set_inputs(found)
    tokens = [generated(run, job["new"])]
    for turn in job.get("turns", ()):
        run.append_tokens(np.array(turn, np.int32))
        tokens.append(generated(run, job["new"]))
    return tokens


def process(model: Any, job: dict[str, Any]) -> list[str]:
    """What genai's own processor makes of {"prompt", "images", "audios"}, into the file {"out"}."""
    media = {"images": og.Images, "audios": og.Audios}
    opened = {key: kind.open(*job[key]) for key, kind in media.items() if job[key]}
    made = model.create_multimodal_processor()(job["prompt"], **opened)
    names = list(made.keys())
    # Its arrays are of C's "long long", which its own tensors do not take back: as bytes they are the same.
    arrays = {name: made[name].as_numpy() for name in names}
    plain = {n: np.frombuffer(a.tobytes(), a.dtype.name).reshape(a.shape) for n, a in arrays.items()}
    np.savez(job["out"], **plain)
    return names


def encode(model: Any, job: dict[str, Any]) -> list[list[int]]:
    """Ids of each of {"texts"}."""
    tokenizer = og.Tokenizer(model)
    return [[int(i) for i in tokenizer.encode(text)] for text in job["texts"]]


def template(model: Any, job: dict[str, Any]) -> str:
    """{"messages"} as the chat template renders them."""
    rendered = og.Tokenizer(model).apply_chat_template(
        json.dumps(job["messages"]), add_generation_prompt=True
    )
    return str(rendered)


def ids(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The ids that genai goes by."""
    tokenizer = og.Tokenizer(model)
    stop = sorted(int(i) for i in tokenizer.eos_token_ids)
    return {"type": model.type, "stop": stop, "bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id}


KINDS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "text": text,
    "inputs": inputs,
    "process": process,
    "encode": encode,
    "template": template,
    "ids": ids,
}


def main() -> None:
    """Do every job in turn; one that genai refuses becomes {"error"}."""
    og.disable_telemetry_events()
    work = json.load(sys.stdin)
    config = og.Config(work["directory"])
    for overlay in work["overlays"]:
        config.overlay(json.dumps(overlay))
    model = og.Model(config)
    results: list[Any] = []
    for job in work["jobs"]:
        try:
            results.append(KINDS[job["kind"]](model, job))
        except RuntimeError as exc:
            results.append({"error": str(exc)})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
