# SPDX-License-Identifier: Apache-2.0
"""What a mode needs in memory: weights, adapter, KV cache, encoders, buffers, the program, a margin.

Shapes say most of it. What they do not say was measured on Phi-4-multimodal at full size, Linux, glibc, from
/proc/self/status before and after each step; `python -m tests.tools.check_ram` compares predictions with
what a run takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from . import ram_encoders, ram_onnx
from .bundle import Bundle
from .errors import InputError
from .gguf_header import BLOCKS
from .hd import CROP_PATCHES, MAX_CROPS, layout
from .parts import Mode
from .ram_encoders import TOKENS_PER_SECOND
from .ram_encoders import FileSize as FileSize
from .spec import Backbone, TextSpec

MODES: tuple[Mode, ...] = ("language", "vision", "speech", "vision_speech")
CELLS = 256  # a context is whole multiples of it
MARGIN = 0.05  # of everything: what a prediction may be off by
CONTEXTS = (1024, 4096, 16384)  # tokens, for an overview
PROMPT_TOKENS = 64  # of the question beside a picture or a clip

BATCH = 512  # tokens in one pass, as in ggml_model
GROWTH = 512  # tokens that room is made for at least when a cache is full, as in session
# Interpreter, numpy, llama.cpp, the command line; OpenCV, ONNX Runtime and the audio readers, once one of
# them is needed; what a context takes beside its cache and its pass. Of phi4-nano's `run`.
PROGRAM, MEDIA, _CONTEXT = 61_000_000, 51_000_000, 9_000_000
_ONNX = 33_000_000  # ONNX Runtime and its first sessions, where there is no medium: part of MEDIA
# For each byte of tokenizer.json: 18.3 in the tokenizer and 12.5 in llama.cpp's vocabulary (13.3 MB and
# phi4-nano's 0.18 MB). While they are read 14.7 more come and go; malloc keeps these, and encoders use them.
_TOKENIZER, _VOCABULARY, _SPARE = 18.3, 12.5, 14.7
_MASK_BYTES = 6  # of attention's mask for a token and a cell: float32, and float16 for flash attention
_REPACKED = ("Q4_0", "Q4_K")  # what stock ggml copies on a CPU with AVX2; it maps the rest
_BYTES = {name.lower(): bytes_ / n for name, n, bytes_ in BLOCKS.values()}


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model on disk, as far as memory depends on it; of a model directory, or of one to be made."""

    text: TextSpec
    backbone: int  # bytes of the GGUF, or of the graphs' data
    quant: Mapping[str, str]  # tensor group -> ggml types; of ONNX as in `bundle.OnnxInfo`
    adapters: Mapping[str, FileSize]
    encoders: Mapping[str, FileSize]
    tokenizer: int  # bytes of tokenizer.json
    engine: Backbone = "gguf"

    @property
    def kv_type(self) -> str | None:
        """The only type that its KV cache can have; None: the user chooses."""
        return "f32" if self.engine == "onnx" else None


@dataclass(frozen=True, slots=True)
class Use:
    """What a model is used for, and how."""

    mode: Mode = "language"
    n_ctx: int = 4096  # tokens that the cache has room for; a medium that needs more gets more
    kv_type: str = "f16"
    image: tuple[int, int] = (1344, 896)  # pixels, width and height
    seconds: float = 30.0  # of audio
    max_crops: int = MAX_CROPS
    grown: bool = False  # token by token: the cache is copied when it is full
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
    mapped: int  # of the backbone's file and int4 encoders, that stays in use; the system may take it back
    adapter: int
    kv: int
    copy: int  # of the cache, while a larger one takes its place: before a pass needs its buffers
    encoder: int  # loaded, with what it keeps from its first run on
    encoder_work: int  # beside that, while it works
    compute: int  # a pass of 512 tokens
    program: int  # interpreter, libraries, tokenizer, vocabulary
    loading: int  # of the file, while it is read: the system may take these pages back

    @property
    def asking(self) -> int:
        """The most that is resident once it is loaded, mapped pages included."""
        return self.certain + self.mapped

    @property
    def peak(self) -> int:
        """The most that is resident at any time."""
        return max(self.program + self.weights + self.loading, self.asking)

    @property
    def certain(self) -> int:
        """What has to be there: without what is mapped, which the system reads again when it must."""
        start = self.program + self.weights + self.encoder
        return start + max(self.encoder_work, self.adapter + self.kv + max(self.compute, self.copy))

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


def sizes_of(bundle: Bundle, engine: Backbone | None = None) -> Sizes:
    """What a model directory holds, with one of its backbones; None: the better one.

    Raises:
        InputError: there is no such backbone.
    """
    on_disk = {f.path: f.size for f in bundle.files}

    def graphs(files: Mapping[str, str]) -> int:
        return sum(on_disk[f] + on_disk.get(f"{f}.data", 0) for f in files.values())

    encoders = {name: FileSize(graphs(e.graphs), e.quant) for name, e in bundle.encoders.items()}
    tokenizer, engine = on_disk[bundle.tokenizer], engine or bundle.backbones[0]
    if engine == "gguf":
        adapters = {n: FileSize(on_disk[a.file], a.quant) for n, a in bundle.adapters.items() if a.file}
        n_bytes = on_disk[bundle.gguf.name]
        return Sizes(bundle.text, n_bytes, bundle.quant, adapters, encoders, tokenizer)
    onnx = bundle.onnx
    if onnx is None:
        raise InputError(f"{bundle.root}: has no ONNX backbone: convert it with --backbone onnx or both")
    adapters = {name: FileSize(on_disk[file], onnx.lora_quant) for name, file in onnx.adapters.items()}
    n_bytes = on_disk.get(f"{onnx.model}.data", 0)
    return Sizes(bundle.text, n_bytes, onnx.quant, adapters, encoders, tokenizer, engine)


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
    kv_type = sizes.kv_type or use.kv_type
    mapped += sum(ram_encoders.mapped_bytes(n, one) for n, one in sizes.encoders.items() if n in use.mode)
    own = adapter_bytes(sizes, adapter)
    if (lora := sizes.adapters.get(adapter or "")) is not None:
        mapped += lora.n_bytes - own
    width, listens, looks = sizes.text.d_model, (0, 0), (0, 0)
    if use.image_tokens:
        looks = ram_encoders.vision_bytes(sizes.encoders["vision"], width, use.image, use.max_crops)
    if use.audio_tokens:
        listens = ram_encoders.speech_bytes(sizes.encoders["speech"], width, use.seconds)
    encoder = looks[0] + listens[0]
    libraries = MEDIA if encoder else _ONNX if sizes.engine == "onnx" else 0
    program = PROGRAM + libraries + tokenizer_bytes(sizes)
    copied = use.context - GROWTH if use.grown else 0
    return Estimate(
        weights=weights,
        mapped=mapped,
        adapter=own,
        kv=kv_bytes(sizes.text, use.context, kv_type),
        copy=copy_bytes(sizes, max(copied, 0), kv_type),
        encoder=max(encoder - spare_bytes(sizes), 0),
        encoder_work=max(looks[1], listens[1]),
        compute=compute_bytes(sizes, use.context, kv_type, lora is not None),
        program=program,
        loading=loading,
    )


def tokenizer_bytes(sizes: Sizes) -> int:
    """The vocabulary in memory. With ONNX llama.cpp's is loaded for grammars alone."""
    return int((_TOKENIZER + (_VOCABULARY if sizes.engine == "gguf" else 0.0)) * sizes.tokenizer)


def overview(bundle: Bundle, engine: Backbone, *, packed: bool) -> dict[Mode, dict[int, int]]:
    """Bytes that each mode should have, by the tokens of a conversation that grows; `packed`: as in `Use`."""
    sizes, most = sizes_of(bundle, engine), bundle.text.context_length
    contexts = [n for n in CONTEXTS if n <= most] or [most]
    return {
        mode: {n: estimate(sizes, Use(mode, n, packed=packed, grown=True)).wanted for n in contexts}
        for mode in modes_of(sizes)
    }


def spare_bytes(sizes: Sizes) -> int:
    """What reading the vocabulary has left for encoders; packing for ONNX Runtime has used it by then."""
    return int(_SPARE * sizes.tokenizer) if sizes.engine == "gguf" else 0


def adapter_bytes(sizes: Sizes, name: str | None) -> int:
    """An adapter's weights: packed, they take what they take on disk. ONNX Runtime's are mapped."""
    found = sizes.adapters.get(name or "")
    return 0 if found is None or sizes.engine == "onnx" else found.n_bytes


def kv_bytes(text: TextSpec, n_ctx: int, kv_type: str) -> int:
    """The KV cache of a context; 0 for a type that there is not, which the decoder refuses."""
    return int(-(-n_ctx // CELLS) * CELLS * text.kv_values_per_token * _BYTES.get(kv_type, 0.0))


def copy_bytes(sizes: Sizes, n: int, kv_type: str) -> int:
    """What is there twice while n tokens go over into a larger cache: all of it, or of ONNX one buffer."""
    return kv_bytes(sizes.text, n, kv_type) // (2 * sizes.text.n_layers if sizes.engine == "onnx" else 1)


def compute_bytes(sizes: Sizes, n_ctx: int, kv_type: str, lora: bool, rows: int = BATCH) -> int:
    """What a context's buffers for passes of `rows` tokens come to, as far as they are touched.

    At most at the MLP: the residual, its norm, and gate and up together; with an adapter B (A x) of these
    beside W x. The logits of 512 rows are part of the buffer (410 MB) and stay untouched but for the last.
    """
    text = sizes.text
    if sizes.engine == "onnx":
        return ram_onnx.compute_bytes(text, n_ctx, lora, rows)
    n, wide = min(rows, n_ctx), 2 * text.d_ff
    values = n * (2 * wide + text.d_model if lora else wide + 2 * text.d_model)
    scores = n * n_ctx * text.n_heads * 4 if kv_type == "f32" else 0  # no flash attention
    return _CONTEXT + values * 4 + n * n_ctx * _MASK_BYTES + scores + 4 * 4 * text.vocab_size


def logits_bytes(sizes: Sizes, n_ctx: int) -> int:
    """Of every row of a pass: llama.cpp makes room for them, and writes those that are asked for."""
    return min(BATCH, n_ctx) * sizes.text.vocab_size * 4 if sizes.engine == "gguf" else 0


def work_of(sizes: Sizes, use: Use) -> tuple[float, float, float, float, bool]:
    """The fields of `machine.Work` for one mode."""
    text = sizes.text
    layer = (2 * text.d_q + 2 * text.d_kv + 3 * text.d_ff) * text.d_model
    adapter = "vision" if use.image_tokens else "speech" if use.audio_tokens else ""
    lora = sizes.adapters.get(adapter, FileSize(0, "Q8_0"))
    bytes_of_one = _BYTES.get(lora.quant.lower()) or ram_onnx.LORA_BYTES.get(lora.quant, 1.0)
    values = text.n_layers * layer + lora.n_bytes / bytes_of_one
    moved = _weights(sizes, packed=True)[0] + lora.n_bytes
    cache = kv_bytes(text, CELLS, sizes.kv_type or use.kv_type) / CELLS
    in_float = sizes.quant.get("ffn_up", sizes.quant.get("linear")) in ("F16", "F32", "BF16", "fp16", "fp32")
    return 2e-9 * values, 4e-6 * text.d_q * text.n_layers, moved / 1e9, cache / 1e3, in_float


def encoder_work(sizes: Sizes, use: Use) -> list[tuple[str, str, float]]:
    """Name, type and 10^9 operations of each encoder of a mode: all weights for every patch or token."""
    patches = layout(*use.image, use.max_crops).n_crops * CROP_PATCHES**2 if use.image_tokens else 0
    found = []
    for name, n in (("vision", patches), ("speech", use.audio_tokens)):
        if n:
            size = sizes.encoders[name]
            found.append((name, size.quant, 2e-9 * ram_encoders.weights_of(name, size) * n))
    return found


def _weights(sizes: Sizes, packed: bool) -> tuple[int, int, int]:
    """Bytes that are copied, those of the file that stay mapped, and those mapped while it is read."""
    text = sizes.text
    if sizes.engine == "onnx":
        return ram_onnx.weights(text, sizes.quant, sizes.backbone, packed)
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


def largest_context(sizes: Sizes, use: Use, fits: Callable[[Estimate], bool]) -> int:
    """The most tokens in all for which `fits` is true; 0 if it is not even for the picture or the clip."""
    low, high = 0, -(-sizes.text.context_length // CELLS)
    while low < high:
        middle = (low + high + 1) // 2
        found = fits(estimate(sizes, replace(use, n_ctx=middle * CELLS)))
        low, high = (middle, high) if found else (low, middle - 1)
    return min(low * CELLS, sizes.text.context_length)


def smaller(sizes: Sizes, use: Use, fits: Callable[[Estimate], bool]) -> list[str]:
    """Flags that make it fit, the first of a few changes, mild ones first; empty: none of them does."""
    crops_tried = [c for c in (16, 8, 4, 1) if c < use.max_crops] if use.image_tokens else []
    for crops in (use.max_crops, *crops_tried):
        for kv_type in dict.fromkeys((use.kv_type, sizes.kv_type or "q8_0")):
            tried = replace(use, max_crops=crops, kv_type=kv_type)
            flags = [] if crops == use.max_crops else ["--max-crops", str(crops)]
            flags += [] if kv_type == use.kv_type else ["--cache-type", kv_type]
            if _BYTES.get(kv_type, 0.0) <= _BYTES.get(use.kv_type, 0.0) and fits(estimate(sizes, tried)):
                return flags
            for n_ctx in (n for n in (8192, 4096, 2048, 1024, 512) if n < use.n_ctx):
                if fits(estimate(sizes, replace(tried, n_ctx=n_ctx))):
                    return [*flags, "-c", str(n_ctx)]
    return []
