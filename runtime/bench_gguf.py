# SPDX-License-Identifier: Apache-2.0
"""How fast a bare GGUF runs here, in tokens, as a share of the machine's limits, and beside stock ggml."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ggml_plugin
from .bench_decoder import Sample, SpeedPlan, open_runner
from .bench_peer import Peer, open_peer
from .decoder_ggml import KV_BYTES
from .errors import BundleError, InputError
from .gguf_check import AdapterFile, read_adapter, read_model
from .gguf_header import GgufHeader, Tensor, text_spec
from .machine import Machine, measure
from .report import human_bytes
from .spec import TextSpec

_SETTLE_S = 0.1  # OpenMP's threads spin for some milliseconds after the last step


@dataclass(frozen=True, slots=True)
class Work:
    """What one token costs, by the file's tensors."""

    macs: int  # multiply-adds of the matrices that every token passes
    last_macs: int  # of those that one token of a prompt passes: the last layer's MLP, the output head
    weight_bytes: int  # that a decoded token reads: the embedding table only where it is the head
    kv_bytes_per_token: float  # of the cache, for each token before

    def prefill_operations(self, n_prompt: int) -> float:
        """Operations for each token of a prompt of which the last one gets logits."""
        return 2 * (self.macs + self.last_macs / n_prompt)

    def decode_bytes(self, depth: int, n_predict: int) -> float:
        """Bytes for each of `n_predict` tokens after `depth`, on average: the i-th reads depth + i keys."""
        return self.weight_bytes + self.kv_bytes_per_token * (depth + (n_predict + 1) / 2)


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians of the repetitions, in tokens a second."""

    prefill_tps: float
    decode_tps: float


@dataclass(frozen=True, slots=True)
class SpeedResult:
    """What `bench` found out about a GGUF."""

    plan: SpeedPlan
    kernels: str  # the variant of ours, or stock
    file_bytes: int
    speed: Speed
    gops: float  # of prefill
    gbps: float  # of decode
    machine: Machine
    peer: Speed | None

    @property
    def ratio(self) -> Speed | None:
        """How many times as fast as the peer."""
        if self.peer is None:
            return None
        return Speed(
            self.speed.prefill_tps / self.peer.prefill_tps, self.speed.decode_tps / self.peer.decode_tps
        )

    def to_object(self) -> dict[str, Any]:
        """For JSON."""
        peer, ratio = self.peer, self.ratio
        return {
            "kernels": self.kernels,
            "prefill_tps": self.speed.prefill_tps,
            "decode_tps": self.speed.decode_tps,
            "gops": self.gops,
            "gbps": self.gbps,
            "machine": self.machine.to_object(),
            "peer": peer and {"prefill_tps": peer.prefill_tps, "decode_tps": peer.decode_tps},
            "ratio": ratio and {"prefill": ratio.prefill_tps, "decode": ratio.decode_tps},
        }


def run(plan: SpeedPlan, *, repetitions: int, compare: bool, note: Callable[[str], None]) -> SpeedResult:
    """Load the model, measure the machine, then both kernels in turns.

    Args:
        plan: what to measure.
        repetitions: the median counts.
        compare: measure stock ggml too, in a process of its own.
        note: told what happens, a line at a time.

    Raises:
        InputError: a number that does not fit the model, or an option that cannot be followed.
        BundleError: not a GGUF, not a model of this family, or an adapter of another one.
        KernelError: no memory, the native library is missing, or the peer failed.
    """
    header = read_model(Path(plan.model), None)
    spec = text_spec(header)
    lora = None if plan.lora is None else read_adapter(AdapterFile(Path(plan.lora)), None, header)
    work = count_work(header, lora, spec, plan.kv_type)
    with ExitStack() as stack:
        note(f"loading {header.path.name}")
        ours = stack.enter_context(open_runner(plan, header, lora))
        state = ggml_plugin.load()
        if not state.active:
            note(f"our kernels are not active: {state.reason}")
        peer: Peer | None = None
        if compare:
            note(f"loading {header.path.name} for the stock peer")
            peer = stack.enter_context(open_peer(plan))
        note(f"measuring the machine on {plan.n_threads} threads")
        time.sleep(_SETTLE_S)
        machine = measure(plan.n_threads)
        samples = _take_turns(ours.sample, None if peer is None else peer.sample, plan, repetitions, note)
        time.sleep(_SETTLE_S)
        machine = machine.or_better(measure(plan.n_threads))  # neighbours come and go
    speed = _medians(plan, [a for a, _ in samples])
    theirs = [b for _, b in samples if b is not None]
    return SpeedResult(
        plan=plan,
        kernels=state.variant if state.active else "stock",
        file_bytes=header.path.stat().st_size,
        speed=speed,
        gops=work.prefill_operations(plan.n_prompt) * speed.prefill_tps / 1e9,
        gbps=work.decode_bytes(plan.depth, plan.n_predict) * speed.decode_tps / 1e9,
        machine=machine,
        peer=_medians(plan, theirs) if theirs else None,
    )


def count_work(header: GgufHeader, lora: GgufHeader | None, spec: TextSpec, kv_type: str) -> Work:
    """What a token costs, from the shapes in the files.

    Raises:
        InputError: no such KV type.
        BundleError: the file has no output head.
    """
    if kv_type not in KV_BYTES:
        raise InputError(f"KV type is {kv_type!r}, expected one of {', '.join(KV_BYTES)}")
    head = header.tensors.get("output.weight") or header.tensors.get("token_embd.weight")
    if head is None:
        raise BundleError(f"{header.path}: has no output head")
    layers = [t for t in header.tensors.values() if t.name.startswith("blk.")]
    adapter = [] if lora is None else list(lora.tensors.values())
    norm = header.tensors.get("output_norm.weight")
    read = [*layers, *adapter, head, *([norm] if norm else [])]
    matrices = [t for t in (*layers, *adapter) if _is_matrix(t)]
    last_mlp = sum(t.n_values for t in matrices if t.name.startswith(f"blk.{spec.n_layers - 1}.ffn_"))
    return Work(
        macs=sum(t.n_values for t in matrices) - last_mlp,
        last_macs=last_mlp + head.n_values,
        weight_bytes=sum(t.n_bytes for t in read),
        kv_bytes_per_token=spec.kv_values_per_token * KV_BYTES[kv_type],
    )


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.n_values > tensor.shape[0]


def _take_turns(
    ours: Callable[[], Sample],
    peer: Callable[[], Sample] | None,
    plan: SpeedPlan,
    repetitions: int,
    note: Callable[[str], None],
) -> list[tuple[Sample, Sample | None]]:
    """Repetition by repetition, ours and the peer's; who begins changes, so that a drift hits both."""
    found: list[tuple[Sample, Sample | None]] = []
    for i in range(repetitions):
        second: Sample | None = None
        if peer is not None and i % 2:
            second = _rested(peer)
        first = _rested(ours)
        if peer is not None and second is None:
            second = _rested(peer)
        found.append((first, second))
        line = f"repetition {i + 1} of {repetitions}: {_tokens(plan, first)}"
        note(line if second is None else f"{line}; stock {_tokens(plan, second)}")
    return found


def _rested(sample: Callable[[], Sample]) -> Sample:
    time.sleep(_SETTLE_S)
    return sample()


def _tokens(plan: SpeedPlan, sample: Sample) -> str:
    speed = _medians(plan, [sample])
    return f"prefill {speed.prefill_tps:.2f}/s, decode {speed.decode_tps:.2f}/s"


def _medians(plan: SpeedPlan, samples: list[Sample]) -> Speed:
    return Speed(
        statistics.median(plan.n_prompt / s.prefill_s for s in samples),
        statistics.median(plan.n_predict / s.decode_s for s in samples),
    )


_HEAD = ("model", "size", "kernels", "threads", "test", "tokens/s", "stock", "ratio", "rate", "of machine")


def table(result: SpeedResult) -> list[str]:
    """The result as a Markdown table, and the machine's limits under it."""
    plan, machine = result.plan, result.machine
    name = Path(plan.model).stem + (f" + {Path(plan.lora).stem}" if plan.lora else "")
    head = (name, human_bytes(result.file_bytes), result.kernels, str(plan.n_threads))
    prefill, decode = ("", ""), ("", "")
    if result.peer is not None and result.ratio is not None:
        prefill = (f"{result.peer.prefill_tps:.2f}", f"{result.ratio.prefill_tps:.2f}")
        decode = (f"{result.peer.decode_tps:.2f}", f"{result.ratio.decode_tps:.2f}")
    rows = [
        _HEAD,
        (
            *(*head, f"pp{plan.n_prompt}", f"{result.speed.prefill_tps:.2f}", *prefill),
            *(f"{result.gops:.1f} GOPS", f"{100 * result.gops / machine.int8_gops:.0f} %"),
        ),
        (
            *(*head, f"tg{plan.n_predict}" + (f" @ d{plan.depth}" if plan.depth else "")),
            *(f"{result.speed.decode_tps:.2f}", *decode),
            *(f"{result.gbps:.2f} GB/s", f"{100 * result.gbps / machine.read_gbps:.0f} %"),
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"| {row[0]:<{widths[0]}} | "
        + " | ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        + " |"
        for row in rows
    ]
    lines.insert(1, f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:]))
    return [
        *lines,
        "",
        f"machine: int8 {machine.int8_gops:.0f} GOPS, fp32 {machine.fp32_gflops:.0f} GFLOPS, "
        f"read {machine.read_gbps:.1f} GB/s on {machine.threads} threads; {' '.join(machine.cpu_features)}",
    ]
