# SPDX-License-Identifier: Apache-2.0
"""`plan`: what fits this machine's memory, and how fast it may be expected to run here."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketphi.runtime.errors import InputError

from .options import Engine, Json, KvType, MaxCrops, Threads
from .values import builtin, log_to_stderr, to_json

if TYPE_CHECKING:
    from pocketphi.convert.survey import Candidate, Survey
    from pocketphi.runtime.machine import Machine
    from pocketphi.runtime.parts import Mode
    from pocketphi.runtime.ram_model import Estimate, Sizes, Use
    from pocketphi.runtime.spec import Backbone

_IMAGE = re.compile(r"([0-9]{1,6})[x×]([0-9]{1,6})", re.ASCII)
_MIB = 1 << 20
_MAX_SECONDS = 4 * 3600  # as in runtime/audio.py
_MAX_PIXELS = 100_000_000  # as in runtime/image.py
# F32 holds nothing that F16 does not.
_BETTER_LAST = ("Q4_0", "Q4_K_M", "int4", "Q5_K_M", "Q6_K", "int8", "Q8_0", "fp16", "F16")


def plan(
    source: Annotated[Path | None, typer.Argument(metavar="[SRC|DIR]", envvar="POCKETPHI_MODEL", help="Checkpoint, or model directory [default: the built-in phi4-nano].")] = None,
    ram: Annotated[str | None, typer.Option("--ram", help="Memory to fit: 8G, 7.5GiB, 512M [default: what this machine has available].")] = None,
    ctx_size: Annotated[int | None, typer.Option("-c", "--ctx", "--ctx-size", min=1, help="Tokens of a conversation [default: 4096].")] = None,
    image: Annotated[str, typer.Option("--image", help="A picture's pixels, WxH.")] = "1344x896",
    audio: Annotated[float, typer.Option("--audio", help="A clip's seconds.")] = 30.0,
    backbone: Annotated[Engine | None, typer.Option("--backbone", help="Which one is meant [default: gguf, where there is one].")] = None,
    cache_type: KvType = "f16", max_crops: MaxCrops = 36, threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """What fits in memory. A checkpoint: every recipe, and the command for the best that fits. A model directory: each
    mode, and the flags that would make it fit. Speeds are estimates from a second's probe of this machine.

    Other commands refuse at once what cannot fit; with POCKETPHI_MEMORY_CHECK=off they try it.
    """
    from pocketphi.runtime import bundle as bundles
    from pocketphi.runtime import memory, ram_model
    from pocketphi.runtime.report import human_bytes

    log_to_stderr(verbose=False)
    room = memory.available()
    n_bytes = (
        memory.parse_bytes(ram, "--ram") if ram is not None else room.n_bytes if room is not None else None
    )
    use = ram_model.Use(
        kv_type=_kv_type(cache_type), image=_pixels(image, max_crops), seconds=_seconds(audio),
        max_crops=max_crops, grown=True,
    )  # fmt: skip
    engine: Backbone | None = None if backbone is None else backbone.value
    path = source or builtin()
    if (path / bundles.MANIFEST).exists() or not path.is_dir():
        bundle = bundles.load(path)
        sizes = ram_model.sizes_of(bundle, engine)
        use = _of_engine(use, sizes, ctx_size)
        found = _model(bundle.name, sizes, use, n_bytes)
    else:
        from pocketphi.convert.survey import survey

        asked = survey(path, engine or "gguf")
        use = _of_engine(use, _sizes(asked, asked.candidates[0]), ctx_size)
        found, sizes = _checkpoint(path, asked, use, n_bytes)
    found["speed"] = _speed(sizes, use, threads)
    if as_json:
        typer.echo(to_json({"source": str(path), "ram": n_bytes, "context": use.n_ctx} | found))
        return
    where = "memory is not known here" if n_bytes is None else f"{human_bytes(n_bytes)} of memory"
    what = f"{use.n_ctx} tokens, picture {use.image[0]}×{use.image[1]}, clip {use.seconds:g} s, cache {use.kv_type}"
    typer.echo(f"{found['name']}: {where}; {what}")
    for line in (*_table(found), *_speed_lines(found["speed"])):
        typer.echo(line)


def _of_engine(use: Use, sizes: Sizes, ctx_size: int | None) -> Use:
    """With what follows from which engine runs the model."""
    from pocketphi.runtime import ggml_plugin, onnx_kernels

    packed = (ggml_plugin if sizes.engine == "gguf" else onnx_kernels).load().active
    return replace(use, n_ctx=_context(ctx_size, sizes), kv_type=sizes.kv_type or use.kv_type, packed=packed)


def _kv_type(name: str) -> str:
    from pocketphi.runtime.decoder_ggml import KV_TYPES

    if name not in KV_TYPES:
        raise InputError(f"--cache-type is {name[:40]!r}, expected one of {', '.join(KV_TYPES)}")
    return name


def _pixels(text: str, max_crops: int) -> tuple[int, int]:
    from pocketphi.runtime.hd import MAX_CROPS, layout

    if not 1 <= max_crops <= MAX_CROPS:
        raise InputError(f"--max-crops is {max_crops}, expected 1 to {MAX_CROPS}")
    match = _IMAGE.fullmatch(text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < width * height <= _MAX_PIXELS:
        raise InputError(
            f"--image is {text[:40]!r}, expected WxH such as 4000x3000, at most {_MAX_PIXELS:,} pixels"
        )
    layout(width, height, max_crops, where="--image")
    return width, height


def _seconds(seconds: float) -> float:
    if not 0.025 <= seconds <= _MAX_SECONDS:
        raise InputError(f"--audio is {seconds:g} seconds, expected 0.025 to {_MAX_SECONDS}")
    return seconds


def _context(wanted: int | None, sizes: Sizes) -> int:
    most = sizes.text.context_length
    if wanted is not None and wanted > most:
        raise InputError(f"context is {wanted} tokens, this model takes 1 to {most}")
    return min(4096, most) if wanted is None else wanted


def _sizes(asked: Survey, candidate: Candidate) -> Sizes:
    from pocketphi.runtime.ram_model import FileSize, Sizes

    return Sizes(
        text=asked.text,
        backbone=candidate.backbone,
        quant=candidate.quant,
        adapters={n: FileSize(b, candidate.lora_quant) for n, b in candidate.adapter_bytes.items()},
        encoders={n: FileSize(b, candidate.encoders) for n, b in candidate.encoder_bytes.items()},
        tokenizer=asked.tokenizer,
        engine=candidate.engine,
    )


def _modes(sizes: Sizes, use: Use) -> dict[Mode, Estimate]:
    from pocketphi.runtime.ram_model import estimate, modes_of

    return {mode: estimate(sizes, replace(use, mode=mode)) for mode in modes_of(sizes)}


def _checkpoint(path: Path, asked: Survey, use: Use, n_bytes: int | None) -> tuple[dict[str, Any], Sizes]:
    """What every recipe needs, and the best that fits in every mode."""
    rows, chosen = [], None
    for candidate in asked.candidates:
        modes = _modes(_sizes(asked, candidate), use)
        fits = None if n_bytes is None else all(e.wanted <= n_bytes for e in modes.values())
        rows.append(
            {
                "recipe": candidate.recipe, "adapters": candidate.lora_quant, "encoders": candidate.encoders,
                "disk": candidate.disk, "fits": fits, "modes": {m: e.to_object() for m, e in modes.items()},
            }
        )  # fmt: skip
        if fits and _rank(candidate) > (_rank(chosen) if chosen is not None else (-2, -2)):
            chosen = candidate
    best = chosen or asked.candidates[0]
    command = _command(path, asked.name, chosen) if chosen is not None else None
    return {"name": asked.name, "recipes": rows, "convert": command}, _sizes(asked, best)


def _rank(candidate: Candidate) -> tuple[int, int]:
    """Encoders of 4 bits cost more than the backbone's last bits gain; then the larger recipe is the better."""
    pair = ("int4", "int8", "fp16").index(candidate.encoders)
    recipe = _BETTER_LAST.index(candidate.recipe) if candidate.recipe in _BETTER_LAST else -1
    return (min(pair, 1) if recipe >= 0 else -1, 3 * recipe + pair)


def _command(path: Path, name: str, candidate: Candidate) -> str:
    words = [
        "pocketphi",
        "convert",
        str(path),
        "-o",
        f"{name}-{candidate.recipe}",
    ]
    onnx = candidate.engine == "onnx"
    words += ["--backbone", "onnx", "--onnx-quant"] if onnx else ["--quant"]
    words.append(candidate.recipe)
    if candidate.adapter_bytes:
        words += ["--onnx-lora" if onnx else "--lora-quant", candidate.lora_quant]
    if candidate.encoder_bytes:
        words += ["--encoders", candidate.encoders]
    return shlex.join(words)


def _model(name: str, sizes: Sizes, use: Use, n_bytes: int | None) -> dict[str, Any]:
    """What each mode needs, the largest context that fits, and flags that would make it fit."""
    from pocketphi.runtime.ram_model import largest_context, smaller

    modes: dict[str, Any] = {}

    def fits(one: Estimate) -> bool:
        return n_bytes is not None and one.wanted <= n_bytes

    for mode, found in _modes(sizes, use).items():
        here = replace(use, mode=mode)
        row = found.to_object() | {"context": here.context}
        if n_bytes is not None:
            row |= {"fits": fits(found), "largest_context": largest_context(sizes, here, fits)}
            row["flags"] = None if row["fits"] else smaller(sizes, here, fits)
        modes[mode] = row
    return {"name": name, "modes": modes}


def _speed(sizes: Sizes, use: Use, threads: int | None) -> dict[str, Any]:
    """What the probe says, and what follows from it."""
    from pocketphi.runtime import kernels, machine
    from pocketphi.runtime.threads import default_threads

    if threads is not None and not 1 <= threads <= 512:
        raise InputError(f"threads is {threads}, expected 1 to 512")
    if not kernels.is_available() or not use.packed:
        return {"reason": "our kernels do not run here, and the estimate is about them"}
    probe = machine.measure(threads or default_threads(), quick=True)
    return {"machine": probe.to_object()} | _expected(probe, sizes, use)


def _expected(probe: Machine, sizes: Sizes, use: Use) -> dict[str, Any]:
    from pocketphi.runtime import machine, ram_model

    found: dict[str, Any] = {}
    for mode in ram_model.modes_of(sizes):
        here = replace(use, mode=mode)
        work = machine.Work(*ram_model.work_of(sizes, here))
        media = here.image_tokens + here.audio_tokens
        prompt = media + ram_model.PROMPT_TOKENS if media else min(512, here.n_ctx)
        encode = sum(machine.encode_s(probe, *one) for one in ram_model.encoder_work(sizes, here))
        read = machine.read_s(probe, work, prompt)
        found[mode] = {
            "prompt_tokens": prompt,
            "encode_s": encode,
            "read_per_second": prompt / read,
            "first_token_s": encode + read,
            "write_per_second": machine.write_rate(probe, work, prompt),
        }
    return {"modes": found}


def _table(found: dict[str, Any]) -> list[str]:
    if "recipes" in found:
        return _recipe_lines(found)
    parts = [
        "weights",
        "mapped",
        "adapter",
        "kv",
        "copy",
        "encoder",
        "encoder_work",
        "compute",
        "program",
        "margin",
    ]
    names = (
        "weights",
        "mapped",
        "adapter",
        "KV",
        "its copy",
        "encoder",
        "its work",
        "buffers",
        "program",
        "margin",
    )
    lines = ["  ".join([f"{'MiB':<14}", *(f"{n:>8}" for n in names), f"{'needs':>8}", "peak RSS"])]
    for mode, row in found["modes"].items():
        lines.append(
            "  ".join([f"{mode:<14}", *(f"{row[p] / _MIB:8,.0f}" for p in (*parts, "total", "peak"))])
        )
    lines.append(
        "needs: the sum; but of the encoder's work and of what comes after it (adapter, KV, and the larger of "
        "buffers and the copy that a growing conversation makes) only the larger"
    )
    lines.append(
        "peak RSS: without margin, but with the whole file mapped while it loads, which can be taken back"
    )
    for mode, row in found["modes"].items():
        if "fits" in row:
            answer = "fits" if row["fits"] else "does not fit"
            if not row["fits"] and row["flags"]:
                answer = f"would fit with {' '.join(row['flags'])}"
            elif not row["fits"]:
                answer = (
                    "nothing fits: neither a smaller context and cache nor fewer crops; a smaller recipe "
                )
                answer += "may (pocketphi plan with the checkpoint)"
            most = f"; at most -c {row['largest_context']}" if row["largest_context"] else ""
            lines.append(f"{mode}: {answer}{most}")
    return lines


def _recipe_lines(found: dict[str, Any]) -> list[str]:
    modes = list(found["recipes"][0]["modes"])
    head = [
        f"{'recipe':<7}",
        f"{'adapters':<8}",
        f"{'encoders':<8}",
        f"{'disk':>7}",
        *(f"{m:>13}" for m in modes),
        "MiB",
    ]
    lines = ["  ".join(head)]
    for row in found["recipes"]:
        cells = [f"{row['recipe']:<7}", f"{row['adapters']:<8}", f"{row['encoders']:<8}"]
        cells += [
            f"{row['disk'] / _MIB:7,.0f}",
            *(f"{e['total'] / _MIB:13,.0f}" for e in row["modes"].values()),
        ]
        lines.append("  ".join([*cells, {True: "fits", False: "", None: ""}[row["fits"]]]).rstrip())
    lines.append(f"best that fits: {found['convert']}" if found["convert"] else "nothing fits")
    return lines


def _speed_lines(speed: dict[str, Any]) -> list[str]:
    if "reason" in speed:
        return [f"no speed: {speed['reason']}"]
    m = speed["machine"]
    lines = [
        f"estimated speed, from a probe of {m['threads']} threads: int8 {m['int8_gops']:.0f} GOPS, "
        f"float32 {m['fp32_gflops']:.0f} GFLOPS, reading {m['read_gbps']:.0f} GB/s"
    ]
    for mode, s in speed["modes"].items():
        lines.append(
            f"{mode}: reads {s['read_per_second']:.0f} tokens/s, first token of {s['prompt_tokens']} tokens after "
            f"{s['first_token_s']:.1f} s, writes {s['write_per_second']:.1f} tokens/s"
        )
    return lines
