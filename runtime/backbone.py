# SPDX-License-Identifier: Apache-2.0
"""Which engine runs a model directory's backbone, and what opens it: llama.cpp or ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import ggml_plugin, onnx_kernels
from .bundle import Bundle
from .decoder_ggml import GgmlDecoder, GgmlOptions
from .decoder_onnx import OnnxDecoder, OnnxOptions
from .decoder_slots import Slot, SlotPool
from .errors import InputError
from .ggml_observer import MatmulObserver
from .gguf_check import AdapterFile
from .hd import MAX_CROPS
from .memory_guard import Guard
from .onnx_adapter_check import OnnxAdapter
from .sampler_ggml import GgmlVocabulary
from .spec import Backbone

_KV_TYPES: dict[Backbone, str] = {"gguf": "f16", "onnx": "f32"}  # where nobody chooses


@dataclass(frozen=True, slots=True)
class BackboneOptions:
    """What a user may say about the engine."""

    backbone: Backbone | None = None  # None: the GGUF where there is one
    provider: str = "cpu"  # of ONNX Runtime, one of onnx_session.PROVIDERS
    n_threads: int | None = None  # None: the physical cores this process may use
    n_gpu_layers: int = 0  # of llama.cpp; -1: all
    kv_type: str | None = None  # None: what suits the engine
    observer: MatmulObserver | None = None  # of what llama.cpp multiplies


class OpenBackbone:
    """A choice that has been checked: the directory has it, the installation can run it. Then its decoder."""

    def __init__(self, bundle: Bundle, options: BackboneOptions, max_crops: int = MAX_CROPS) -> None:
        """
        Args:
            bundle: the model directory.
            options: the engine and what it takes.
            max_crops: for the memory guard.

        Raises:
            InputError: the directory has no such backbone, or an option is out of range or for the other one.
        """
        self._bundle, self._options = bundle, options
        self.kind = _choose(bundle, options)
        self.provider = options.provider
        self.kv_type = _KV_TYPES[self.kind] if options.kv_type is None else options.kv_type
        on_cpu = options.n_gpu_layers == 0 and options.provider == "cpu"
        packed = (ggml_plugin if self.kind == "gguf" else onnx_kernels).load().active
        self.guard = Guard(
            bundle, self.kv_type, packed=packed, on_cpu=on_cpu, n_threads=options.n_threads,
            max_crops=max_crops, backbone=self.kind,
        )  # fmt: skip
        self._load = self._ggml(options) if self.kind == "gguf" else self._onnx(options)
        self._vocabulary: GgmlVocabulary | None = None

    def open(self) -> GgmlDecoder | OnnxDecoder:
        """Load the weights.

        Raises:
            BundleError: a file is damaged or not the one that the manifest describes.
            KernelError: the engine cannot be loaded.
        """
        return self._load()

    def open_slots(self, n: int, capacity: int) -> SlotPool:
        """Load the weights for `n` decoders that share them, each with room for `capacity` tokens.

        Raises:
            BundleError, KernelError: as `open`.
            InputError: a number out of range, or the backbone is ONNX, which has one decoder.
        """
        if self.kind != "gguf":
            raise InputError("several conversations at a time need the GGUF backbone, not the ONNX one")
        bundle = self._bundle
        return SlotPool(
            bundle.gguf, bundle.text, self._ggml_adapters(), self._ggml_options(self._options),
            n_slots=n, capacity=capacity,
        )  # fmt: skip

    def vocab(self, decoder: GgmlDecoder | OnnxDecoder | Slot) -> Any:
        """The model's `llama_vocab *`, for grammars; loaded when it is first asked for.

        Raises:
            BundleError: its file is damaged.
            InputError: there is none.
        """
        if isinstance(decoder, (GgmlDecoder, Slot)):
            return decoder.vocab
        if self._vocabulary is None:
            bundle = self._bundle
            name = bundle.vocabulary or bundle.decoder
            if name is None:
                raise InputError(f"{bundle.root}: has no vocabulary for grammars: convert it again")
            alone = bundle.vocabulary is not None
            self._vocabulary = GgmlVocabulary(bundle.path(name), bundle.text, alone=alone)
        return self._vocabulary.pointer

    def close(self) -> None:
        """Give back the vocabulary. Safe to call twice."""
        if self._vocabulary is not None:
            self._vocabulary.close()
            self._vocabulary = None

    def _ggml(self, options: BackboneOptions) -> Callable[[], GgmlDecoder]:
        bundle, checked, adapters = self._bundle, self._ggml_options(options), self._ggml_adapters()
        return lambda: GgmlDecoder(bundle.gguf, bundle.text, adapters, checked)

    def _ggml_options(self, options: BackboneOptions) -> GgmlOptions:
        return GgmlOptions(
            options.n_threads, options.n_gpu_layers, self.kv_type, options.observer, self.guard.cache
        )

    def _ggml_adapters(self) -> dict[str, AdapterFile]:
        return {
            name: AdapterFile(self._bundle.path(one.file), one.alpha, one.rank)
            for name, one in self._bundle.adapters.items()
            if one.file is not None
        }

    def _onnx(self, options: BackboneOptions) -> Callable[[], OnnxDecoder]:
        bundle, onnx = self._bundle, self._bundle.onnx
        assert onnx is not None
        if options.n_gpu_layers != 0:
            raise InputError(
                f"GPU layers is {options.n_gpu_layers}, but the ONNX backbone runs on a provider (--provider)"
            )
        if options.observer is not None:
            raise InputError("importances are measured with the GGUF backbone, not with the ONNX one")
        checked = OnnxOptions(options.provider, options.n_threads, self.kv_type, self.guard.cache)
        adapters = {
            name: OnnxAdapter(bundle.path(file), bundle.adapters[name].rank, onnx.lora_quant)
            for name, file in onnx.adapters.items()
        }
        return lambda: OnnxDecoder(
            bundle.path(onnx.decoder), bundle.path(onnx.embedding), bundle.text, adapters, checked
        )


def _choose(bundle: Bundle, options: BackboneOptions) -> Backbone:
    """The engine, if the directory has a backbone for it."""
    kind = options.backbone
    if kind is None:
        kind = bundle.backbones[0]
    if kind not in _KV_TYPES:
        raise InputError(f"backbone is {str(kind)[:40]!r}, expected one of {', '.join(_KV_TYPES)}")
    if kind not in bundle.backbones:
        raise InputError(
            f"{bundle.root}: has no {kind.upper()} backbone: convert it with --backbone {kind} or both"
        )
    if kind == "gguf" and options.provider != "cpu":
        raise InputError(
            f"provider is {options.provider[:40]!r}, but the GGUF backbone runs on llama.cpp: "
            "providers are for --backbone onnx"
        )
    return kind
