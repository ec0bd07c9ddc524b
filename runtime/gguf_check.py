# SPDX-License-Identifier: Apache-2.0
"""Whether a model or an adapter may be given to llama.cpp: what it aborts on is refused here, by name.

llama.cpp answers much of what is wrong with a file by ending the process (GGML_ASSERT). Read for it:
llama-model-loader.cpp, llama-model.cpp (load_hparams), models/phi3.cpp, llama-vocab.cpp, llama-adapter.cpp
and ggml.c (ggml_rope_impl) of llama-cpp-python 0.3.36. Our own files are held to every number of bundle.json;
a foreign one may say more than we know, as long as llama.cpp survives it.

Two things are not looked for. Weights that are not finite: that is a full read, and the decoder looks at
every logit. A file that becomes shorter later on: llama.cpp maps it, and the process dies of SIGBUS when a
page is gone; what can be done is to look at the size right before.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BundleError
from .gguf_header import ARCHITECTURE, KINDS, Array, GgufHeader, Tensor, Value, read_header, text_spec
from .spec import TextSpec

_log = logging.getLogger(__name__)

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MIN_ALIGNMENT = 32  # TENSOR_ALIGNMENT: of the mapped file, or ggml aborts
_FINGERPRINT, _ADAPTER = "pocketphi.source.fingerprint", "pocketphi.adapter"
_ALPHA = "adapter.lora.alpha"
_NO_WEIGHTS = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")  # types no matrix of a model can have
_ADAPTER_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_ROPE_TYPES = ("none", "linear", "yarn", "longrope")
_TOKENIZERS = ("gpt2", "llama")

# What a key has to be where it is there: llama.cpp asks for exactly this kind.
_KINDS = {
    "general.architecture": "string",
    "general.name": "string",
    "general.type": "string",
    "general.file_type": "u32",
    "split.count": "u16",
    "tokenizer.ggml.model": "string",
    "tokenizer.ggml.pre": "string",
    "tokenizer.ggml.add_bos_token": "bool",
    "tokenizer.ggml.add_eos_token": "bool",
    **{f"tokenizer.ggml.{name}_token_id": "u32" for name in ("bos", "eos", "unknown", "padding")},
    **{
        f"{ARCHITECTURE}.{name}": kind
        for names, kind in (
            ("context_length embedding_length feed_forward_length block_count attention.head_count "
             "attention.head_count_kv rope.dimension_count rope.scaling.original_context_length "
             "attention.sliding_window", "u32"),
            ("attention.layer_norm_rms_epsilon rope.freq_base rope.scaling.attn_factor rope.scaling.factor "
             "rope.scale_linear rope.scaling.alpha", "f32"),
            ("rope.scaling.type", "string"),
            ("rope.scaling.finetuned attention.causal", "bool"),
        )
        for name in names.split()
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter of a decoder, and what bundle.json says of it. None: it is a bare file."""

    path: Path
    alpha: float | None = None
    rank: int | None = None


def read_model(path: Path, spec: TextSpec | None) -> GgufHeader:
    """The header of a backbone that llama.cpp can be given.

    Args:
        spec: what bundle.json says the model is; None for a foreign file.

    Raises:
        BundleError: it cannot.
    """
    header = read_header(path)
    check_model(header, spec)
    return header


def check_model(header: GgufHeader, spec: TextSpec | None) -> None:
    """See `read_model`."""
    _check_kinds(header)
    found = text_spec(header)
    if spec is not None:
        _compare(header, found, spec)
    _check_shape(header, found)
    _check_vocabulary(header, found, strict=spec is not None)
    _check_tensors(header, found, strict=spec is not None)
    _check_factors(header, found, spec)


def read_vocabulary(path: Path, spec: TextSpec) -> None:
    """See to it that llama.cpp can be given a GGUF without tensors, for its vocabulary alone.

    Args:
        spec: what bundle.json says the model is.

    Raises:
        BundleError: it cannot.
    """
    header = read_header(path)
    _check_kinds(header)
    if header.text("general.architecture") != ARCHITECTURE or header.tensors:
        raise _wrong(header, f"is not a vocabulary of the architecture {ARCHITECTURE}")
    _check_shape(header, spec)
    _check_vocabulary(header, spec, strict=True)


def read_adapter(file: AdapterFile, name: str | None, base: GgufHeader) -> GgufHeader:
    """The header of an adapter that fits a backbone and that llama.cpp can be given.

    Args:
        name: in bundle.json; None for a foreign file.
        base: of the backbone.

    Raises:
        BundleError: it cannot, or it belongs to another backbone, or it is another adapter.
    """
    header = read_header(file.path)
    check_adapter(header, base, file, name)
    return header


def check_adapter(header: GgufHeader, base: GgufHeader, claim: AdapterFile, name: str | None) -> None:
    """See `read_adapter`."""
    for key, wanted in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", ARCHITECTURE),
    ):
        if header.text(key) != wanted:
            raise _wrong(header, f"is not an adapter for this model: {key} is {_short(header, key)}")
    if KINDS[header.kinds.get(_ALPHA, 0)] != "f32":
        raise _wrong(header, f"has no {_ALPHA} that is f32")
    alpha = header.number(_ALPHA)
    if alpha <= 0:
        raise _wrong(header, f"has alpha {alpha:g}, expected a number above 0")
    if claim.alpha is not None and not _same(alpha, claim.alpha):
        raise _wrong(header, f"has alpha {alpha:g}, bundle.json says {claim.alpha:g} for {name}")
    _check_origin(header, base, name)
    _check_pairs(header, base, claim.rank, strict=name is not None)


def _check_origin(header: GgufHeader, base: GgufHeader, name: str | None) -> None:
    mine, theirs = header.text(_FINGERPRINT), base.text(_FINGERPRINT)
    if mine is None or theirs is None:
        level = logging.INFO if name else logging.WARNING  # a directory's files belong together by its list
        _log.log(level, "%s: does not say which backbone it was made for", header.path)
    elif mine != theirs:
        raise _wrong(header, f"is an adapter of another checkpoint ({mine[:16]}…) than {base.path.name}")
    kind, merged = header.text(_ADAPTER), base.text("pocketphi.merged")
    if name is not None and kind is not None and kind != name:
        raise _wrong(header, f"is the {kind[:40]} adapter, expected the {name} adapter")
    if kind is not None and merged is not None:
        raise _wrong(header, f"does not fit {base.path.name}, which has its {merged[:40]} adapter merged in")


def _check_pairs(header: GgufHeader, base: GgufHeader, rank: int | None, *, strict: bool) -> None:
    """Each tensor A [in, rank] has its B [rank, out], and both a matrix [in, out] of the backbone."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for tensor in header.tensors.values():
        target, _, part = tensor.name.rpartition(".")
        if part in ("lora_a", "lora_b"):
            pairs.setdefault(target, {})[part] = tensor
        elif strict or not tensor.name.endswith("_norm.weight"):
            raise _wrong(header, f"tensor {tensor.name!r} is no part of an adapter")
        else:
            _log.warning("%s: tensor %r is not used", header.path, tensor.name)
    if not pairs:
        raise _wrong(header, "holds no adapter at all")
    linear = {name for name in _matrices(text_spec(base)) if name != "token_embd.weight"}
    for target, pair in pairs.items():
        matrix = base.tensors.get(target)
        if matrix is None or target not in linear or ".lora_" in target:
            raise _wrong(header, f"adapts {target!r}, which is no linear layer of {base.path.name}")
        if len(pair) != 2:
            raise _wrong(header, f"has only {next(iter(pair))} for {target!r}, expected lora_a and lora_b")
        a, b = pair["lora_a"], pair["lora_b"]
        r = _padded(a)[1] if rank is None else rank
        _check_dims(header, a, (matrix.shape[0], r))
        _check_dims(header, b, (r, matrix.shape[1]))
        for tensor in (a, b):
            if tensor.type_name not in _ADAPTER_TYPES:
                raise _wrong(header, f"tensor {tensor.name!r} is {tensor.type_name}, not fit for an adapter")


def _check_kinds(header: GgufHeader) -> None:
    for key, wanted in _KINDS.items():
        kind = header.kinds.get(key)
        if kind is not None and KINDS[kind] != wanted:
            raise _wrong(header, f"{key} is of type {KINDS[kind]}, expected {wanted}")


def _compare(header: GgufHeader, found: TextSpec, spec: TextSpec) -> None:
    """Every number that bundle.json and the file both say."""
    rope = spec.rope
    pairs = [
        ("block_count", found.n_layers, spec.n_layers),
        ("embedding_length", found.d_model, spec.d_model),
        ("attention.head_count", found.n_heads, spec.n_heads),
        ("attention.head_count_kv", found.n_kv_heads, spec.n_kv_heads),
        ("embedding_length / head_count", found.head_dim, spec.head_dim),
        ("feed_forward_length", found.d_ff, spec.d_ff),
        ("rows of the embedding", found.vocab_size, spec.vocab_size),
        ("context_length", found.context_length, spec.context_length),
        ("attention.layer_norm_rms_epsilon", found.rms_eps, spec.rms_eps),
        ("rope.dimension_count", found.rope.dims, rope.dims),
        ("rope.freq_base", found.rope.theta, rope.theta),
    ]
    if rope.is_long_rope and found.rope.is_long_rope:
        pairs += [
            ("rope.scaling.original_context_length", found.rope.original_context, rope.original_context),
            ("rope.scaling.attn_factor", found.rope.attention_factor, rope.attention_factor),
        ]
    for key, value, wanted in pairs:
        if not _same(value, wanted):
            raise _wrong(header, f"has {key} {value:g}, bundle.json says {wanted:g}")
    for what, has, should in (
        ("an output head of its own", not found.tied_head, not spec.tied_head),
        ("LongRoPE factors", found.rope.is_long_rope, rope.is_long_rope),
    ):
        if has != should:
            raise _wrong(header, f"has {'' if has else 'not '}{what}, bundle.json says otherwise")


def _check_shape(header: GgufHeader, t: TextSpec) -> None:
    if header.alignment < _MIN_ALIGNMENT:
        raise _wrong(header, f"has alignment {header.alignment}, expected at least {_MIN_ALIGNMENT}")
    if "split.count" in header.keys and header.number("split.count") > 1:
        raise _wrong(header, "is one part of a model in several files: merge them first")
    if t.n_layers > MAX_LAYERS:
        raise _wrong(header, f"has block_count {t.n_layers}, expected at most {MAX_LAYERS}")
    if t.d_model % t.n_heads or t.n_heads % t.n_kv_heads:
        raise _wrong(header, f"has {t.n_heads} heads and {t.n_kv_heads} for keys at width {t.d_model}, "
                     "expected each to divide the one before")  # fmt: skip
    if t.rope.dims % 2 or t.rope.dims > t.head_dim:
        raise _wrong(header, f"rotates {t.rope.dims} dimensions of {t.head_dim}, expected an even number")
    for what, value in (("rope.freq_base", t.rope.theta), ("layer_norm_rms_epsilon", t.rms_eps),
                        ("rope.scaling.attn_factor", t.rope.attention_factor)):  # fmt: skip
        if value <= 0:
            raise _wrong(header, f"has {what} {value:g}, expected a number above 0")
    scaling = header.text(f"{ARCHITECTURE}.rope.scaling.type")
    if scaling is not None and scaling not in _ROPE_TYPES:
        raise _wrong(header, f"has rope.scaling.type {scaling[:40]!r}, expected {', '.join(_ROPE_TYPES)}")
    # llama.cpp reads these for every architecture; in this one they are not there, or say what is so anyway.
    neutral: dict[str, Value] = {
        "nextn_predict_layers": 0,
        "expert_count": 0,
        "expert_used_count": 0,
        "expert_group_count": 0,
        "pooling_type": 0,
        "attention.causal": True,
        "attention.key_length": t.head_dim,
        "attention.value_length": t.head_dim,
        "attention.key_length_swa": t.head_dim,
        "attention.value_length_swa": t.head_dim,
        "rope.dimension_count_swa": t.rope.dims,
        "embedding_length_out": t.d_model,
        "classifier.output_labels": "none",
    }
    for name, wanted in neutral.items():
        key = f"{ARCHITECTURE}.{name}"
        if header.keys.get(key, wanted) != wanted:
            raise _wrong(header, f"has {name} {_short(header, key)}, expected {wanted}")


def _check_vocabulary(header: GgufHeader, t: TextSpec, *, strict: bool) -> None:
    """As many tokens as the embedding has rows, no two alike: llama.cpp aborts on one that is there twice."""
    model = header.text("tokenizer.ggml.model")
    if model not in _TOKENIZERS:
        raise _wrong(
            header, f"has tokenizer {_short(header, 'tokenizer.ggml.model')}, expected gpt2 or llama"
        )
    arrays = {"tokens": header.array("tokenizer.ggml.tokens", "string")}
    for name, kinds in (("token_type", ("i32",)), ("scores", ("f32", "i32"))):
        if f"tokenizer.ggml.{name}" in header.keys:
            arrays[name] = header.array(f"tokenizer.ggml.{name}", *kinds)
    for name, array in arrays.items():
        if array.count != t.vocab_size and (strict or name == "tokens" or array.count < t.vocab_size):
            raise _wrong(header, f"has {array.count} {name} for {t.vocab_size} rows of the embedding")
    if model == "gpt2":
        header.array("tokenizer.ggml.merges", "string")
    tokens = [  # as llama.cpp reads them
        token if token and 0 not in token else token.partition(b"\0")[0] or b"[EMPTY_%d]" % i
        for i, token in enumerate(header.strings("tokenizer.ggml.tokens"))
    ]
    if len(set(tokens)) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0].decode("utf-8", "replace")
        raise _wrong(header, f"token {twice[:40]!r} is there twice")
    for key, value in header.keys.items():
        is_id = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if strict and is_id and isinstance(value, int) and not 0 <= value < t.vocab_size:
            raise _wrong(header, f"{key} is {value}, expected less than {t.vocab_size}")


def _matrices(t: TextSpec) -> dict[str, tuple[int, int]]:
    """Every matrix that a model of this shape may have, by name: (row's length, rows)."""
    found = {"token_embd.weight": (t.d_model, t.vocab_size), "output.weight": (t.d_model, t.vocab_size)}
    for i in range(t.n_layers):
        for name, shape in (
            ("attn_qkv", (t.d_model, t.d_model + 2 * t.d_kv)),
            ("attn_q", (t.d_model, t.d_model)),
            ("attn_k", (t.d_model, t.d_kv)),
            ("attn_v", (t.d_model, t.d_kv)),
            ("attn_output", (t.d_model, t.d_model)),
            ("ffn_up", (t.d_model, 2 * t.d_ff)),
            ("ffn_down", (t.d_ff, t.d_model)),
        ):
            found[f"blk.{i}.{name}.weight"] = shape
    return found


def _check_tensors(header: GgufHeader, t: TextSpec, *, strict: bool) -> None:
    """The tensors of the architecture at their shapes; what is not a matrix has to be F32."""
    matrices = _matrices(t)
    vectors = {"output_norm.weight": t.d_model}
    vectors |= {f"blk.{i}.{n}_norm.weight": t.d_model for i in range(t.n_layers) for n in ("attn", "ffn")}
    factors = {f"rope_factors_{name}.weight": t.rope.dims // 2 for name in ("long", "short")}
    split = [f"blk.{i}.attn_{n}.weight" for i in range(t.n_layers) for n in "qkv"]
    fused = [f"blk.{i}.attn_qkv.weight" for i in range(t.n_layers)]
    optional = {"output.weight", *split, *fused}
    unfused = not strict and fused[0] not in header.tensors
    needed = [n for n in matrices if n not in optional] + [*vectors, *(split if unfused else fused)]
    needed += factors if any(name in header.tensors for name in factors) else []
    for name in needed:
        if name not in header.tensors:
            raise _wrong(header, f"has no tensor {name!r}")
    for name, tensor in header.tensors.items():
        if name in matrices:
            _check_dims(header, tensor, matrices[name])
            if tensor.type_name in _NO_WEIGHTS or (
                name == "token_embd.weight" and tensor.type_name == "NVFP4"
            ):
                raise _wrong(header, f"tensor {name!r} is {tensor.type_name}, not fit for a weight")
        elif tensor.type_id != 0:
            raise _wrong(header, f"tensor {name!r} is {tensor.type_name}, expected F32")
        elif name in vectors or name in factors:
            _check_dims(header, tensor, ((vectors | factors)[name],))
    if not strict:
        return
    extra = header.tensors.keys() - set(needed) - {"output.weight"}
    if extra:
        raise _wrong(header, f"has the unknown tensor {min(extra)!r}")
    end = max(tensor.offset + tensor.n_bytes for tensor in header.tensors.values())
    if header.size != -(-end // header.alignment) * header.alignment:
        raise _wrong(header, f"has {header.size - end} bytes after its last tensor")


def _check_factors(header: GgufHeader, t: TextSpec, spec: TextSpec | None) -> None:
    if not t.rope.is_long_rope:
        return
    for kind in ("long", "short"):
        name = f"rope_factors_{kind}.weight"
        values = header.float32(name)
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise _wrong(header, f"tensor {name!r} holds a factor that is not a number above 0")
        if spec is not None and not np.array_equal(
            values, np.array(getattr(spec.rope, f"{kind}_factor"), np.float32)
        ):
            raise _wrong(header, f"tensor {name!r} differs from bundle.json's {kind}_factor")


def _check_dims(header: GgufHeader, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if _padded(tensor) != (*wanted, *[1] * (4 - len(wanted))):
        raise _wrong(
            header, f"tensor {tensor.name!r} has shape {list(tensor.shape)}, expected {list(wanted)}"
        )


def _padded(tensor: Tensor) -> tuple[int, ...]:
    return (*tensor.shape, *[1] * (4 - len(tensor.shape)))


def _same(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= 1e-6 * abs(wanted)  # float32 in the file


def _short(header: GgufHeader, key: str) -> str:
    value = header.keys.get(key)
    return "an array" if isinstance(value, Array) else repr(value)[:60]


def _wrong(header: GgufHeader, what: str) -> BundleError:
    return BundleError(f"{header.path}: {what}")
