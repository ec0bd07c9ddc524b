# SPDX-License-Identifier: Apache-2.0
"""Makes every file of this folder with transformers. Run from the repository's top folder:

    python -m tests.golden.make_golden

needs the `reference` extra. See README.md here for what is made and which reference runs are avoided.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # before numpy loads

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer
from transformers import Phi3ForCausalLM, Phi4MultimodalForCausalLM

from .. import tiny
from ..tiny_files import decode, read_checkpoint, read_safetensors
from . import decoder64
from .cases import HERE, MODELS, Float32, Int32, checkpoint, checkpoint_hash, rows_of
from .make_chat import make_chat

GREEDY = 20  # tokens
LEAD = 9  # a crossing generation starts so many tokens before the first long sequence
EVAL = tiny.NANO.parent / "eval"


@dataclass(frozen=True)
class Plan:
    """A case before it is run."""

    name: str
    ids: Int32  # [n], -1 for a row of embedding input
    adapter: str | None = None
    greedy: int = GREEDY
    steps: tuple[int, ...] = ()  # greedy tokens appended when logits are recorded


class Reference:
    """One checkpoint in transformers: float32, eager attention, no cache, so no table can be stale."""

    def __init__(self, model: str, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        native = self.config["model_type"] == "phi4_multimodal"
        kind = Phi4MultimodalForCausalLM if native else Phi3ForCausalLM
        self.net = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.weights = read_checkpoint(folder)
        self.adapters: dict[str, decoder64.Adapter] = {}
        for name in ("vision", "speech") if native else ():
            path = folder / f"{name}-lora"
            self.net.load_adapter(str(path), adapter_name=name)
            entries = read_safetensors(path / "adapter_model.safetensors")
            lora = json.loads((path / "adapter_config.json").read_text("utf-8"))
            scale = lora["lora_alpha"] / lora["r"]
            self.adapters[name] = ({key: decode(entry) for key, entry in entries.items()}, scale)

    def select(self, adapter: str | None) -> None:
        """Turn exactly this adapter on."""
        if adapter is not None:
            self.net.enable_adapters()
            self.net.set_adapter(adapter)
        elif self.adapters:
            self.net.disable_adapters()

    def embed(self, ids: Int32, rows: Float32) -> Float32:
        """float32 [n, d_model]: the embedding's rows, and `rows` where an id is negative."""
        x: Float32 = self.weights["model.embed_tokens.weight"][np.maximum(ids, 0)]
        x[ids < 0] = rows
        return x

    @torch.no_grad()
    def logits(self, ids: Int32, rows: Float32) -> Float32:
        """float32 [v] after the last position, by one whole forward pass."""
        if len(rows):
            given = {"inputs_embeds": torch.from_numpy(self.embed(ids, rows))[None]}
        else:
            given = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
        out: Float32 = self.net(**given, use_cache=False, logits_to_keep=1).logits[0, -1].numpy()
        return out

    def errors(self, ids: Int32, rows: Float32, adapter: str | None, got: Float32) -> tuple[float, float]:
        """(distance from the float64 decoder, what rounded angles move there): see README.md."""
        x, lora = self.embed(ids, rows), self.adapters[adapter] if adapter else None
        want = decoder64.logits(self.config, self.weights, x, lora)
        rounded = decoder64.logits(self.config, self.weights, x, lora, angle_roundings=1)
        worst = float(np.abs(got - want).max())
        # Rounding reaches 5e-4 at 1300 positions; a wrong table or adapter moves logits by more than 0.1.
        assert worst < 1e-3, f"transformers and float64 differ by {worst}"
        return worst, float(np.abs(rounded - want).max())


def run(reference: Reference, model: str, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """(entry of cases.json, arrays of the npz)."""
    ids, rows = plan.ids, rows_of(model, plan.name, int((plan.ids < 0).sum()))
    reference.select(plan.adapter)
    first = reference.logits(ids, rows)
    errors = [reference.errors(ids, rows, plan.adapter, first)]
    if plan.adapter:
        reference.select(None)
        assert np.abs(reference.logits(ids, rows) - first).max() > 0.1, (
            f"{plan.name}: the adapter does nothing"
        )
        reference.select(plan.adapter)
    greedy: list[int] = []
    margins, kept, now = [], [], first
    for step in range(plan.greedy):
        if step in plan.steps:
            errors.append(reference.errors(ids, rows, plan.adapter, now))
            kept.append(now)
        second, best = np.partition(now, -2)[-2:]
        margins.append(best - second)
        greedy.append(int(now.argmax()))
        ids = np.append(ids, np.int32(greedy[-1]))
        now = reference.logits(ids, rows)
    arrays = {
        "ids": plan.ids,
        "logits": first,
        "greedy": np.array(greedy, np.int32),
        "margins": np.array(margins, np.float32),
        "steps": np.array(plan.steps, np.int32),
        "step_logits": np.array(kept, np.float32).reshape(len(kept), len(first)),
    }
    entry = {
        "name": plan.name,
        "adapter": plan.adapter,
        "n_tokens": len(plan.ids),
        "n_rows": int((plan.ids < 0).sum()),
        "n_greedy": plan.greedy,
        "steps": list(plan.steps),
        "float32_error": float(f"{max(e for e, _ in errors):.1e}"),
        "angle_error": float(f"{max(e for _, e in errors):.1e}"),
    }
    return entry, {f"{plan.name}/{key}": value for key, value in arrays.items()}


def some_ids(label: str, count: int, below: int) -> Int32:
    """`count` ordinary token ids, fixed by the label."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    return (np.random.PCG64(seed).random_raw(count) % below).astype(np.int32)


def boundary(original: int, long: int, sequence: Int32, adapter: str | None = None) -> list[Plan]:
    """Lengths around the switch of tables, and a generation that crosses it. Each ends as `sequence` ends."""
    start = original + 1 - LEAD
    return [
        Plan("below", sequence[-(original - 1) :], adapter, greedy=0),
        Plan("at", sequence[-original:], adapter, greedy=0),
        Plan("over", sequence[-(original + 1) :], adapter, greedy=0),
        Plan("long", sequence[-long:], adapter),
        # lengths original - 1, original, original + 1, original + 2
        Plan("cross", sequence[-start:], adapter, steps=(LEAD - 2, LEAD - 1, LEAD, LEAD + 1)),
    ]


def with_rows(*runs: Int32 | int) -> Int32:
    """Token runs and, as plain numbers, lengths of embedding spans between them."""
    return np.concatenate([np.full(r, -1, np.int32) if isinstance(r, int) else r for r in runs])


def adapter_plans(model: str, prompts: dict[str, Int32], over: Int32) -> list[Plan]:
    """phi4-multimodal and phi4-nano: adapters over text, and embedding input as encoders would give it."""
    found = []
    for adapter in ("vision", "speech"):
        found += [Plan(f"{adapter}-{name}", ids, adapter) for name, ids in prompts.items()]
        found.append(Plan(f"{adapter}-over", over, adapter, greedy=0))
    head, tail = some_ids(f"{model}/head", 3, 2848), some_ids(f"{model}/tail", 6, 2848)
    found.append(Plan("rows-middle", with_rows(head, 7, tail), "vision"))
    found.append(Plan("rows-first", with_rows(12, tail), "speech"))
    found.append(Plan("rows-two-spans", with_rows(head, 4, tail, 9, head), None))
    found.append(Plan("rows-last", with_rows(head, tail, 5), "speech", greedy=4))
    found.append(
        Plan(
            "rows-cross",
            with_rows(head, 200, over[-(len(over) - 203 - LEAD) :]),
            "vision",
            steps=(LEAD - 1, LEAD),
        )
    )
    return found


def tiny_plans(model: str, config: dict[str, Any]) -> list[Plan]:
    """The cases of a tiny member; its prompts are arbitrary ordinary ids."""
    below = {"phi4-14b": 320, "phi35-mini": 448}.get(model, 2848)
    first = 3 if model == "phi35-mini" else 0  # not <unk>, <s>, </s>
    text = {n: first + some_ids(f"{model}/{n}", n, below - first) for n in (1, 7, 33)}
    sequence = first + some_ids(f"{model}/long", 420, below - first)
    found = [Plan("one", text[1]), Plan("short", text[7]), Plan("medium", text[33])]
    if model == "phi4-mini-reasoning":
        return found[:2]
    if model == "phi4-14b":
        return [*found, Plan("long", sequence[-300:])]
    original = config["original_max_position_embeddings"]
    found += boundary(original, original + 150, sequence)
    if model == "phi4-multimodal":
        over = sequence[-(original + 1) :]
        found += adapter_plans(model, {"short": text[7], "medium": text[33]}, over)
    return found


def nano_plans(config: dict[str, Any]) -> list[Plan]:
    """phi4-nano's cases: questions of its evaluation set, and one long conversation made of them."""
    tokenizer = Tokenizer.from_file(str(tiny.NANO / "tokenizer.json"))

    def encode(text: str) -> Int32:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    text = [json.loads(line) for line in (EVAL / "text.jsonl").read_text("utf-8").splitlines()]
    tools = [json.loads(line) for line in (EVAL / "tools.jsonl").read_text("utf-8").splitlines()]
    found = [Plan(row["id"], encode(row["prompt"])) for row in (*text[:40:10], *tools[:2])]
    turns = [f"{row['prompt']}{row['reference']}<|end|>" for row in text if "<|system|>" not in row["prompt"]]
    sequence = encode("".join(turns * 3) + text[1]["prompt"])
    original = config["original_max_position_embeddings"]
    found += boundary(original, original + 300, sequence)
    prompts = {"text": encode(text[1]["prompt"])}
    return found + adapter_plans("phi4-nano", prompts, sequence[-(original + 1) :])


def main() -> None:
    """Write logits/*.npz, cases.json and chat.json."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "peft": peft.__version__,
    }
    index: dict[str, Any] = {"versions": versions, "models": {}}
    (HERE / "logits").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            reference = Reference(model, checkpoint(model, Path(folder)))
            config = reference.config
            plans = nano_plans(config) if model == "phi4-nano" else tiny_plans(model, config)
            done = [run(reference, model, plan) for plan in plans]
            arrays = {name: array for _, part in done for name, array in part.items()}
            np.savez_compressed(HERE / "logits" / f"{model}.npz", **arrays)
            digest = checkpoint_hash(reference.weights)
            index["models"][model] = {"weights_sha256": digest, "cases": [entry for entry, _ in done]}
        make_chat(Path(folder))
    (HERE / "cases.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
