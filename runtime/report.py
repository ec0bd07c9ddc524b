# SPDX-License-Identifier: Apache-2.0
"""Replies and model directories as people and scripts read them: lines of text, objects for JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import ram_model
from .bundle import Bundle
from .parts import BenchRow, Reply
from .spec import Backbone

if TYPE_CHECKING:
    from .ggml_plugin import PluginState
    from .onnx_kernels import OnnxKernels


def reply_object(reply: Reply) -> dict[str, Any]:
    """What `run --json` prints: the answer, token counts, timings in milliseconds, memory in bytes."""
    timings, usage = reply.timings, reply.usage
    return {
        "text": reply.text,
        "reasoning": reply.reasoning,
        "tool_calls": [asdict(call) for call in reply.tool_calls],
        "token_ids": list(reply.token_ids),
        "mode": reply.mode,
        "adapter": reply.adapter,
        "finish_reason": reply.finish_reason,
        "usage": asdict(usage) | {"total_tokens": usage.prompt_tokens + usage.completion_tokens},
        "timings": asdict(timings)
        | {
            "prompt_per_second": timings.prompt_per_second,
            "predicted_per_second": timings.predicted_per_second,
        },
        "notes": list(reply.notes),
        "resident": list(reply.resident),
        "peak_rss_bytes": peak_rss(),
    }


def reply_line(reply: Reply) -> str:
    """One line of figures for stderr."""
    t = reply.timings
    return (
        f"[read {t.prompt_n} tokens at {t.prompt_per_second:.1f}/s, wrote {len(reply.token_ids)} "
        f"at {t.predicted_per_second:.1f}/s, first after {t.ttft_ms:.0f} ms, load {t.load_ms:.0f} ms]"
    )


def bundle_object(bundle: Bundle) -> dict[str, Any]:
    """What `info --json` prints: bundle.json, where it is, and the sum of its files."""
    found: dict[str, Any] = json.loads(bundle.to_json())
    return found | {"directory": str(bundle.root), "total_bytes": sum(f.size for f in bundle.files)}


def bundle_lines(bundle: Bundle) -> list[str]:
    """What `info` prints."""
    text, rope = bundle.text, bundle.text.rope
    long_rope = f", long RoPE above {rope.original_context}" if rope.is_long_rope else ""
    revision = f" at {bundle.source.revision}" if bundle.source.revision else ""
    rows = [
        ("name", bundle.name),
        ("family", bundle.family),
        ("shape", f"{text.n_layers} layers, {text.d_model} wide, MLP {text.d_ff}"),
        ("attention", f"{text.n_heads} heads, {text.n_kv_heads} for keys and values, {text.head_dim} wide"),
        ("vocabulary", str(text.vocab_size)),
        ("context", f"{text.context_length} tokens{long_rope}"),
        ("KV cache", _cache(bundle)),
        ("backbones", " and ".join(name.upper() for name in bundle.backbones)),
        ("recipe", bundle.recipe),
        *((f"  {group}", types) for group, types in sorted(bundle.quant.items())),
        *(
            (f"{name} adapter", f"rank {a.rank}, alpha {a.alpha:g}, {a.quant}")
            for name, a in sorted(bundle.adapters.items())
        ),
        *((f"{name} encoder", e.quant) for name, e in sorted(bundle.encoders.items())),
        *_onnx_rows(bundle),
        ("merged", bundle.merged or "nothing"),
        ("chat format", bundle.chat_format),
        ("licence", bundle.licence),
        ("source", f"{bundle.source.name}{revision}"),
        ("converter", bundle.converter),
        *(("file", f"{f.path}  {human_bytes(f.size)}  sha256 {f.sha256[:16]}…") for f in bundle.files),
    ]
    return [f"{key:<16}{value}" for key, value in rows]


def _cache(bundle: Bundle) -> str:
    """What a token takes, by default."""
    kinds = {"gguf": ("f16", 2), "onnx": ("f32", 4)}
    sizes = [(kinds[name], bundle.text.kv_values_per_token) for name in bundle.backbones]
    return ", ".join(f"{human_bytes(n * size)} a token at {kind}" for (kind, size), n in sizes)


def _onnx_rows(bundle: Bundle) -> Iterator[tuple[str, str]]:
    if (onnx := bundle.onnx) is not None:
        yield "ONNX backbone", ", ".join(f"{group} {kind}" for group, kind in sorted(onnx.quant.items()))
        if onnx.adapters:
            yield "ONNX adapters", f"{', '.join(sorted(onnx.adapters))}: {onnx.lora_quant}"


def memory_object(bundle: Bundle, packed: Mapping[Backbone, bool]) -> dict[str, Any]:
    """Bytes that are needed, estimated, by backbone, mode and tokens; `packed`: our kernels run."""
    return {e: ram_model.overview(bundle, e, packed=packed[e]) for e in bundle.backbones}


def memory_lines(bundle: Bundle, packed: Mapping[Backbone, bool]) -> list[str]:
    """The same as a table, a line for each backbone and mode."""
    lines = ["memory needed, estimated (see `pocketphi plan`), by mode and tokens of the conversation:"]
    for engine, modes in memory_object(bundle, packed).items():
        for mode, found in modes.items():
            cells = "  ".join(f"{n:,}: {human_bytes(size)}" for n, size in found.items())
            lines.append(f"  {engine.upper():<5} {mode:<14}  {cells}")
    return lines


def kernels_line(state: PluginState, counts: Mapping[str, int] | None = None) -> str:
    """Which code multiplies the decoder's matrices, and what it has done so far where `counts` are given."""
    if not state.active:
        return f"stock ggml: {state.reason}"
    line = f"{state.variant} ({state.path.stem} for ggml {state.ggml})"
    if not counts:
        return line
    return (
        f"{line}, {counts['graphs']} graphs, {counts['matmuls']} matmuls of "
        f"{counts['matmul_tokens']} tokens, "
        f"{counts['attentions']} attentions, {human_bytes(counts['packed_bytes'])} of packed weights"
    )


def onnx_kernels_line(state: OnnxKernels) -> str:
    """The same of the ONNX backbone."""
    if not state.active:
        return f"ONNX Runtime's own: {state.reason}"
    return f"{state.variant} ({state.path.stem} under ONNX Runtime)"


def kernels_object(
    state: PluginState | OnnxKernels, counts: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The same for JSON."""
    found: dict[str, Any] = asdict(state) | {"path": str(state.path)}
    return found if counts is None else found | {"counts": dict(counts)}


_BENCH = "| {:<16} | {:>7} | {:>9} | {:>10} | {:>8} | {:>9} | {:>8} | {:>9} |"


def bench_head() -> str:
    """The first two lines of the Markdown table that `bench` prints."""
    names = ("case", "tokens", "encode ms", "prefill ms", "tokens/s", "TTFT ms", "decode/s", "peak RSS")
    rule = "".join("-" if c != "|" else c for c in _BENCH.format(*[""] * 8))
    return f"{_BENCH.format(*names)}\n{rule}"


def bench_line(row: BenchRow) -> str:
    """One more line of it."""
    return _BENCH.format(
        row.name,
        row.prompt_n,
        f"{row.encode_ms:.0f}",
        f"{row.prompt_ms:.0f}",
        f"{row.prompt_per_second:.1f}",
        f"{row.ttft_ms:.0f}",
        f"{row.predicted_per_second:.1f}",
        "" if row.peak_rss_bytes is None else human_bytes(row.peak_rss_bytes),
    )


def human_bytes(n: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def peak_rss() -> int | None:
    """The most memory this process had resident, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
