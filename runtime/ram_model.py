# SPDX-License-Identifier: Apache-2.0
"""What a mode needs in memory: weights, adapter, KV cache, encoders, buffers, the program, a margin.

Shapes say most of it. What they do not say was measured on Phi-4-multimodal at full size, Linux, glibc, from
/proc/self/status before and after each step; `python -m tests.tools.check_ram` compares predictions with
what a run takes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from . import memory
from .bundle import Bundle
from .gguf_header import BLOCKS
from .hd import CROP_PATCHES, MAX_CROPS, layout
from .parts import Mode
from .spec import TextSpec

MODES: tuple[Mode, ...] = ("language", "vision", "speech", "vision_speech")
CELLS = 256  # a context is whole multiples of it
MARGIN = 0.05  # of everything: what a prediction may be off by
_CERTAIN = 1 - MARGIN  # so much of a prediction is refused where it is not there
TOKENS_PER_SECOND = 12.5  # of audio
PROMPT_TOKENS = 64  # of the question beside a picture or a clip

_BATCH = 512  # tokens in one pass, as in decoder_ggml
_PROGRAM = 70_000_000  # interpreter, numpy, llama.cpp and its threads, the command line: `run` of phi4-nano
_MEDIA = 55_000_000  # OpenCV, ONNX Runtime and the audio readers, once one of them is needed
# For each byte of tokenizer.json: 18.3 in the tokenizer and 12.5 in llama.cpp's vocabulary (13.3 MB and
# phi4-nano's 0.18 MB). While they are read 14.7 more come and go; malloc keeps these, and encoders use them.
_TOKENIZER, _SPARE = 30.8, 14.7
_MASK_BYTES = 6  # of attention's mask for a token and a cell: float32, and float16 for flash attention
_CROP_BYTES = 3 * 448 * 448 * 4
_CROP_FEATURES = 256
_REPACKED = ("Q4_0", "Q4_K")  # what stock ggml copies on a CPU with AVX2; it maps the rest
_SMALLER_RECIPE = "a smaller recipe would fit, see `pocketphi plan SRC --ram`"
_SAID = {"vision": "looking at a picture", "speech": "listening", "vision_speech": "looking and listening"}
_BYTES = {name.lower(): bytes_ / n for name, n, bytes_ in BLOCKS.values()}


@dataclass(frozen=True, slots=True)
class _Cost:
    """An encoder at full size, by the type of its weights."""

    file: int  # bytes of its graphs
    resident: float  # loaded, for each byte of the file
    work: int  # bytes of ONNX Runtime's arena after the first crop, or for a clip's first tokens


# fp16 is computed in fp32; int4 keeps what is mapped beside what it packs.
_VISION = {
    "int8": _Cost(429_900_000, 1.17, 150_000_000),
    "int4": _Cost(319_800_000, 1.42, 230_000_000),
    "fp16": _Cost(824_200_000, 2.12, 235_000_000),
    "fp32": _Cost(1_645_500_000, 1.01, 235_000_000),
}
_SPEECH = {
    "int8": _Cost(470_700_000, 1.01, 46_000_000),
    "int4": _Cost(309_400_000, 1.35, 45_000_000),
    "fp16": _Cost(935_400_000, 2.10, 60_000_000),
    "fp32": _Cost(1_866_500_000, 1.00, 50_000_000),
}
_VISION_WIDTH, _SPEECH_WIDTH = 1152, 1024
_PROJECTOR_BYTES = 50_000_000  # of 2,048 rows in the vision projector
_SPEECH_TOKEN_BYTES, _BLOCK_TOKENS = 280_000, 500  # for a token of a block, and a block's most


@dataclass(frozen=True, slots=True)
class FileSize:
    """An adapter or an encoder on disk."""

    n_bytes: int
    quant: str  # Q8_0, …; int8, int4, fp16 or fp32


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model on disk, as far as memory depends on it; of a model directory, or of one to be made."""

    text: TextSpec
    backbone: int  # bytes
    quant: Mapping[str, str]  # tensor group -> ggml types
    adapters: Mapping[str, FileSize]
    encoders: Mapping[str, FileSize]
    tokenizer: int  # bytes of tokenizer.json


@dataclass(frozen=True, slots=True)
class Use:
    """What a model is used for, and how."""

    mode: Mode = "language"
    n_ctx: int = 4096  # tokens that the cache has room for; a medium that needs more gets more
    kv_type: str = "f16"
    image: tuple[int, int] = (1344, 896)  # pixels, width and height
    seconds: float = 30.0  # of audio
    max_crops: int = MAX_CROPS
    packed: bool = True  # our kernels keep weights packed; stock ggml maps most of them

    @property
    def image_tokens(self) -> int:
        """Positions of the picture in the prompt; 0 where there is none."""
        return layout(*self.image, self.max_crops).n_tokens if "vision" in self.mode else 0

    @property
    def audio_tokens(self) -> int:
        """Positions of the clip in the prompt; 0 where there is none."""
        return int(self.seconds * TOKENS_PER_SECOND) + 1 if "speech" in self.mode else 0

    @property
    def context(self) -> int:
        """Tokens that room is made for."""
        media = self.image_tokens + self.audio_tokens
        wanted = max(self.n_ctx, media + PROMPT_TOKENS if media else 1)
        return -(-wanted // CELLS) * CELLS


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one mode, by what takes them. Not all of it is taken at the same moment: see `peak`."""

    weights: int  # the backbone's, as kernels want them
    mapped: int  # of the backbone's file, that stays in use; the system may take these pages back
    adapter: int
    kv: int
    encoder: int  # loaded, with what it keeps from its first run on
    encoder_work: int  # beside that, while it works
    compute: int  # a pass of 512 tokens
    program: int  # interpreter, libraries, tokenizer, vocabulary
    loading: int  # of the file, while it is read: the system may take these pages back

    @property
    def asking(self) -> int:
        """The most that is resident once it is loaded, mapped pages included."""
        encoded = self.program + self.weights + self.mapped + self.encoder
        return encoded + max(self.encoder_work, self.adapter + self.kv + self.compute)

    @property
    def peak(self) -> int:
        """The most that is resident at any time."""
        return max(self.program + self.weights + self.loading, self.asking)

    @property
    def certain(self) -> int:
        """What has to be there: without what is mapped, which the system reads again when it must."""
        start = self.program + self.weights + self.encoder
        return start + max(self.encoder_work, self.adapter + self.kv + self.compute)

    @property
    def margin(self) -> int:
        """What to leave free beside it."""
        return int(MARGIN * self.certain)

    @property
    def wanted(self) -> int:
        """What a machine should have for it: the certain part, what stays mapped, and the margin."""
        return self.certain + self.mapped + self.margin

    def to_object(self) -> dict[str, Any]:
        """For JSON."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return parts | {
            "margin": self.margin,
            "peak": self.peak,
            "certain": self.certain,
            "total": self.wanted,
        }


def sizes_of(bundle: Bundle) -> Sizes:
    """What a model directory holds."""
    on_disk = {f.path: f.size for f in bundle.files}

    def graphs(files: Mapping[str, str]) -> int:
        return sum(on_disk[f] + on_disk.get(f"{f}.data", 0) for f in files.values())

    return Sizes(
        text=bundle.text,
        backbone=on_disk[bundle.decoder],
        quant=bundle.quant,
        adapters={name: FileSize(on_disk[a.file], a.quant) for name, a in bundle.adapters.items()},
        encoders={name: FileSize(graphs(e.graphs), e.quant) for name, e in bundle.encoders.items()},
        tokenizer=on_disk[bundle.tokenizer],
    )


def modes_of(sizes: Sizes) -> tuple[Mode, ...]:
    """The modes that a model has the encoders for."""
    missing = {"vision", "speech"} - set(sizes.encoders)
    return tuple(mode for mode in MODES if not any(name in mode for name in missing))


def estimate(sizes: Sizes, use: Use) -> Estimate:
    """What one mode takes, from nothing running to an answer.

    Raises:
        InputError: the picture is too thin.
    """
    weights, mapped, loading = _weights(sizes, use.packed)
    adapter = "vision" if use.image_tokens else "speech" if use.audio_tokens else None
    looks = vision_bytes(sizes, use.image, use.max_crops) if use.image_tokens else (0, 0)
    listens = speech_bytes(sizes, use.seconds) if use.audio_tokens else (0, 0)
    encoder = looks[0] + listens[0]
    program = _PROGRAM + (_MEDIA if encoder else 0) + int(_TOKENIZER * sizes.tokenizer)
    return Estimate(
        weights=weights,
        mapped=mapped,
        adapter=adapter_bytes(sizes, adapter),
        kv=kv_bytes(sizes.text, use.context, use.kv_type),
        encoder=max(encoder - int(_SPARE * sizes.tokenizer), 0),
        encoder_work=max(looks[1], listens[1]),
        compute=compute_bytes(sizes.text, use.context, use.kv_type, adapter in sizes.adapters),
        program=program,
        loading=loading,
    )


def adapter_bytes(sizes: Sizes, name: str | None) -> int:
    """An adapter's weights: packed, they take what they take on disk."""
    found = sizes.adapters.get(name or "")
    return 0 if found is None else found.n_bytes


def kv_bytes(text: TextSpec, n_ctx: int, kv_type: str) -> int:
    """The KV cache of a context; 0 for a type that there is not, which the decoder refuses."""
    return int(-(-n_ctx // CELLS) * CELLS * text.kv_values_per_token * _BYTES.get(kv_type, 0.0))


def compute_bytes(text: TextSpec, n_ctx: int, kv_type: str, lora: bool) -> int:
    """What llama.cpp's buffers of one pass come to, as far as they are touched.

    At most at the MLP: the residual, its norm, and gate and up together; with an adapter B (A x) of these
    beside W x. The logits of 512 rows are part of the buffer (410 MB) and stay untouched but for the last.
    """
    n = min(_BATCH, n_ctx)
    wide = 2 * text.d_ff
    values = n * (2 * wide + text.d_model if lora else wide + 2 * text.d_model)
    scores = n * n_ctx * text.n_heads * 4 if kv_type == "f32" else 0  # no flash attention
    return values * 4 + n * n_ctx * _MASK_BYTES + scores + 4 * 4 * text.vocab_size


def _logits_bytes(text: TextSpec, n_ctx: int) -> int:
    """Of every row of a pass: llama.cpp makes room for them, and writes those that are asked for."""
    return min(_BATCH, n_ctx) * text.vocab_size * 4


def vision_bytes(sizes: Sizes, image: tuple[int, int], max_crops: int) -> tuple[int, int]:
    """The vision encoder loaded with what it keeps, and what it takes while it reads a picture."""
    size = sizes.encoders["vision"]
    cost, (width, height) = _cost("vision", size), image
    made = layout(width, height, max_crops)
    scale = _scale(size, cost)
    rows = made.n_tokens * sizes.text.d_model * 4
    features = int(made.n_crops * _CROP_FEATURES * _VISION_WIDTH * scale) * 4
    work = width * height * 3 + made.n_crops * _CROP_BYTES + 2 * features + int(_PROJECTOR_BYTES * scale)
    return int(cost.resident * size.n_bytes + cost.work * scale) + rows, work + rows


def speech_bytes(sizes: Sizes, seconds: float) -> tuple[int, int]:
    """The speech encoder loaded with what it keeps, and what it takes while it reads a clip."""
    size = sizes.encoders["speech"]
    cost = _cost("speech", size)
    scale = _scale(size, cost)
    tokens = int(seconds * TOKENS_PER_SECOND) + 1
    rows = tokens * sizes.text.d_model * 4
    hidden = int(tokens * _SPEECH_WIDTH * scale) * 4
    clip = int(seconds * 24_000 * 4)  # 16,000 samples and 8,000 log-mel features a second
    arena = cost.work + min(tokens, _BLOCK_TOKENS) * _SPEECH_TOKEN_BYTES
    return int(cost.resident * size.n_bytes + arena * scale) + rows + hidden, clip + rows


def work_of(sizes: Sizes, use: Use) -> tuple[float, float, float, float, bool]:
    """The fields of `machine.Work` for one mode."""
    text = sizes.text
    layer = (2 * text.d_q + 2 * text.d_kv + 3 * text.d_ff) * text.d_model
    adapter = "vision" if use.image_tokens else "speech" if use.audio_tokens else ""
    lora = sizes.adapters.get(adapter, FileSize(0, "Q8_0"))
    values = text.n_layers * layer + lora.n_bytes / _BYTES.get(lora.quant.lower(), 1.0)
    moved = _weights(sizes, packed=True)[0] + lora.n_bytes
    cache = kv_bytes(text, CELLS, use.kv_type) / CELLS
    in_float = sizes.quant.get("ffn_up") in ("F16", "F32", "BF16")
    return 2e-9 * values, 4e-6 * text.d_q * text.n_layers, moved / 1e9, cache / 1e3, in_float


def encoder_work(sizes: Sizes, use: Use) -> list[tuple[str, str, float]]:
    """Name, type and 10^9 operations of each encoder of a mode: all weights for every patch or token."""
    patches = layout(*use.image, use.max_crops).n_crops * CROP_PATCHES**2 if use.image_tokens else 0
    found = []
    for name, n in (("vision", patches), ("speech", use.audio_tokens)):
        if n:
            size = sizes.encoders[name]
            values = _cost(name, FileSize(0, "int8")).file * _scale(size, _cost(name, size)) ** 2
            found.append((name, size.quant, 2e-9 * values * n))
    return found


def _scale(size: FileSize, cost: _Cost) -> float:
    """A smaller encoder is narrower by about the root of its weights, and so is what it computes."""
    return float(min(1.0, (size.n_bytes / cost.file) ** 0.5))


def _weights(sizes: Sizes, packed: bool) -> tuple[int, int, int]:
    """Bytes that are copied, those of the file that stay mapped, and those mapped while it is read."""
    text = sizes.text
    embedding = _row_bytes(sizes.quant.get("token_embd", "F16"), text.d_model) * text.vocab_size
    embedding = min(embedding, sizes.backbone)
    if packed:  # a tied embedding is looked up in the file and multiplied as the head
        return sizes.backbone - (0 if text.tied_head else embedding), embedding, sizes.backbone
    rows = {"attn_qkv": text.d_q + 2 * text.d_kv, "attn_output": text.d_q}
    rows |= {"ffn_up": 2 * text.d_ff, "ffn_down": text.d_ff}
    copied = [group for group in rows if sizes.quant.get(group) in _REPACKED]
    repacked = sum(_row_bytes(sizes.quant[g], text.n_layers * rows[g] * text.d_model) for g in copied)
    return repacked, sizes.backbone, sizes.backbone


def _row_bytes(types: str, n_values: int) -> int:
    """Bytes of values of a type, or of the widest of several: "Q5_K+Q6_K"."""
    return int(n_values * max(_BYTES.get(name.lower(), 4.0) for name in types.split("+")))


class Guard:
    """Refuses what would run out of memory, before it is tried; MemoryShortError. Never what is uncertain."""

    def __init__(self, bundle: Bundle, kv_type: str, *, packed: bool, on_cpu: bool) -> None:
        """`packed`: as in `Use`; `on_cpu`: no layer is for a GPU."""
        self._name, self._sizes, self._kv_type = bundle.name, sizes_of(bundle), kv_type
        self._packed, self._on_cpu = packed, on_cpu

    def load(self, mode: Mode = "language") -> None:
        """Before anything is loaded: is there room for weights, vocabulary and the smallest context?"""
        if mode not in modes_of(self._sizes):
            return  # which is another error, and not of memory
        use = Use(mode, CELLS, self._kv_type, image=(448, 448), seconds=1.0, packed=self._packed)
        found = estimate(self._sizes, use)
        needed = found.certain - found.program + int(_TOKENIZER * self._sizes.tokenizer)
        idle = _logits_bytes(self._sizes.text, CELLS) + memory.stack_bytes()  # of the decoder's thread
        what = self._name if mode == "language" else f"{self._name}, {_SAID[mode]},"
        self._require(what, needed, _SMALLER_RECIPE, idle, found.loading)

    def media(self, kinds: Collection[str], adapter: str | None, resident: Collection[str]) -> None:
        """Before encoders of "image" and "audio" and an adapter load; `resident` is `Model.resident`."""
        encoders = {"image": "vision", "audio": "speech"}
        wanted = {f"{encoders[kind]} encoder" for kind in kinds} - set(resident)
        sizes = {n: self._sizes.encoders.get(n.split()[0]) for n in wanted}
        needed = sum(int(_cost(n, size).resident * size.n_bytes) for n, size in sizes.items() if size)
        if adapter is not None and f"{adapter} adapter" not in resident:
            wanted.add(f"{adapter} adapter")
            needed += adapter_bytes(self._sizes, adapter)
        needed -= int(_SPARE * self._sizes.tokenizer)  # what reading the vocabulary has left is used again
        if needed > 0:
            advice = "text alone would fit, or a conversion with --encoders int4 --lora-quant Q4_0"
            self._require(f"{self._name}: {' and '.join(sorted(wanted))}", needed, advice)

    def cache(self, before: int, after: int) -> None:
        """Before a KV cache of `after` tokens takes the place of one of `before` tokens."""
        needed = self._cache(after, self._kv_type) - self._cache(before, self._kv_type)
        if needed > 0:
            idle = _logits_bytes(self._sizes.text, after) - _logits_bytes(self._sizes.text, before)
            advice = self._smaller_cache(before, after)
            self._require(f"a context of {after} tokens", needed, advice, max(idle, 0))

    def _cache(self, n: int, kv_type: str) -> int:
        text = self._sizes.text
        return kv_bytes(text, n, kv_type) + compute_bytes(text, n, kv_type, lora=False) if n else 0

    def _smaller_cache(self, before: int, after: int) -> str:
        room = memory.available()
        spare = (0 if room is None else room.n_bytes) + self._cache(before, self._kv_type)
        if self._kv_type in ("f32", "f16") and self._cache(after, "q8_0") <= spare:
            return "--cache-type q8_0 would fit"
        n = largest_context(self._sizes.text, self._kv_type, spare)
        return f"-c {n} would fit" if n else _SMALLER_RECIPE

    def _require(self, what: str, needed: int, advice: str, idle: int = 0, mapped: int = 0) -> None:
        if self._on_cpu:
            memory.require(what, int(_CERTAIN * needed), advice, idle=idle, mapped=mapped)


def largest_context(text: TextSpec, kv_type: str, n_bytes: int, lora: bool = False) -> int:
    """The most tokens whose cache and buffers take no more than that; 0 if not even the fewest fit."""
    low, high = 0, -(-text.context_length // CELLS)
    while low < high:
        middle = (low + high + 1) // 2
        n = middle * CELLS
        fits = kv_bytes(text, n, kv_type) + compute_bytes(text, n, kv_type, lora) <= n_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return min(low * CELLS, text.context_length)


def _cost(name: str, size: FileSize) -> _Cost:
    costs = _VISION if name.startswith("vision") else _SPEECH
    return costs.get(size.quant, costs["fp32"])
