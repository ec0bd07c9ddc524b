# SPDX-License-Identifier: Apache-2.0
"""The one module that knows the whole chain: a model directory in, answers out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import numpy as np

from .answer import Answer, Request
from .backbone import BackboneOptions
from .embeddings import spans
from .errors import InputError
from .ggml_observer import MatmulObserver
from .hd import MAX_CROPS
from .messages import Turn, parse
from .model_parts import ModelParts
from .parts import AudioProjector, EmbedSpan, Float32, Int32, Media, Mode, Progress, Reply, TokenSpan
from .prompt import Piece, Slot, parse_raw, render
from .router import route
from .sampler import Sampling
from .sampler_ggml import GgmlSampler
from .session import Session
from .spec import AdapterName, Backbone
from .stream import TextStream
from .tools import parse_tools

if TYPE_CHECKING:
    from typing_extensions import Unpack

_log = logging.getLogger(__name__)

_MODE_OF_ADAPTER: Mapping[str, Mode] = {"vision": "vision", "speech": "speech"}
_MOST_TOP_LOGPROBS = 100  # which take 12 KB for each token of an answer


class CompleteOptions(TypedDict, total=False):
    """What `Model.complete` takes beside the prompt; see there."""

    sampling: Sampling | None
    max_tokens: int | None
    adapter: AdapterName | None
    stop: Sequence[str]
    media: Sequence[Media]  # for `complete` only: what its `<|image_n|>` and `<|audio_n|>` stand for
    draft: Sequence[int]
    n_forced: int
    logprobs: bool
    top_logprobs: int
    stop_ids: Collection[int]


class ChatOptions(CompleteOptions, total=False):
    """What `Model.chat` takes beside the messages; see there."""

    tools: str | Sequence[Mapping[str, Any]] | None


class Model:
    """A model directory, loaded. A context manager; one conversation at a time, not for several threads.

    Example:
        >>> with pocketphi.Model("phi-4-mini-Q4_K_M") as model:
        ...     print(model.chat([{"role": "user", "content": "What is the capital of France?"}]).text)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_ctx: int = 0,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        kv_type: str | None = None,
        max_crops: int = MAX_CROPS,
        progress: Progress | None = None,
        observer: MatmulObserver | None = None,
        backbone: Backbone | None = None,
        provider: str = "cpu",
        parts: ModelParts | None = None,
        slot: int = 0,
    ) -> None:
        """
        Args:
            path: a directory made by `pocketphi convert`.
            n_ctx: the most tokens a conversation may have; 0: what the model was trained for. Memory
                is taken as a conversation grows, not for the whole of it at once.
            n_threads: None: the physical cores this process may use.
            n_gpu_layers: layers for the GPU backend, where llama-cpp-python was built with one; -1: all.
            kv_type: of the KV cache: f32, f16, q8_0 or q4_0; None: f16. The ONNX backbone has f32 alone.
            max_crops: 448-pixel squares a picture may be cut into; fewer mean fewer tokens and less
                time. The reference has 36.
            progress: told of reading all files whole, which is done when a directory is first opened:
                are they those that `convert` wrote?
            observer: of everything that the GGUF backbone reads.
            backbone: which one runs, where the directory has both; None: the GGUF.
            provider: what the ONNX backbone runs on: cpu, cuda, coreml, dml, qnn or webgpu.
            parts: of a `ModelPool`: what else would be loaded with the options above.
            slot: of its decoders.

        Raises:
            BundleError: the directory is missing, damaged or of another version.
            InputError: an option out of range, or not possible with this directory or installation.
            MemoryShortError: the weights need more than this process may take.
        """
        if parts is None:
            options = BackboneOptions(backbone, provider, n_threads, n_gpu_layers, kv_type, observer)
            parts = ModelParts(Path(path), options, n_ctx=n_ctx, max_crops=max_crops, progress=progress)
        started = time.perf_counter()
        self._parts, self._backbone, self._guard = parts, parts.backbone, parts.guard
        self.bundle, self.tokenizer = parts.bundle, parts.tokenizer
        self._decoder = parts.open(slot)
        self._notes: list[str] = []
        self._session = Session(self._decoder, limit=parts.limit, note=self._note)
        self._answer: Answer | None = None
        self._load_ms = (parts.load_s + time.perf_counter() - started) * 1e3

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory. Safe to call twice."""
        self._end_answer()
        self._decoder.close()
        if not self._parts.shared:
            self._parts.close()

    def forget(self) -> None:
        """Empty the KV cache and drop the encodings that were kept; what is loaded stays loaded."""
        self._end_answer()
        self._session.reset()
        self._parts.forget_media()

    @property
    def engine(self) -> dict[str, str]:
        """What runs the decoder: "backbone", gguf or onnx; its "provider"; "kv_type", of the KV cache."""
        used = self._backbone
        return {"backbone": used.kind, "provider": used.provider, "kv_type": used.kv_type}

    @property
    def context_used(self) -> int:
        """Tokens of the conversation in the KV cache."""
        return self._session.length

    @property
    def context_limit(self) -> int:
        """The most tokens a conversation may have."""
        return self._session.limit

    @property
    def resident(self) -> tuple[str, ...]:
        """What is in memory beside the backbone: each adapter and encoder comes when it is first needed."""
        return (
            *(f"{name} adapter" for name in self._decoder.resident_adapters),
            *(f"{name} encoder" for name in self._parts.encoders),
        )

    @overload
    def chat(
        self, messages: Sequence[Turn], *, stream: Literal[False] = False, **options: Unpack[ChatOptions]
    ) -> Reply: ...
    @overload
    def chat(
        self, messages: Sequence[Turn], *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> Answer: ...
    def chat(
        self, messages: Sequence[Turn], *, stream: bool = False, **options: Unpack[ChatOptions]
    ) -> Reply | Answer:
        """Answer a conversation. What it shares with the one before is not read again.

        Args:
            messages: the turns, oldest first: `Message`, or dicts with "role" and "content", which is
                text or a list of text, image and audio parts (see `messages.parse`). Text in them
                never becomes control tokens, whatever it spells.
            stream: give an `Answer` to iterate over instead of the whole `Reply`.
            **options:
                sampling: a `Sampling`; None: greedy.
                max_tokens: None: until the model stops or the context is full.
                adapter: read everything through this LoRA; None: as the router says (MODEL.md).
                stop: texts that end the answer and are not part of it.
                tools: what the model may call, as a JSON list or its Python equal.
                draft: token ids that the answer may start with, such as `Reply.token_ids` of a reading
                    of almost the same. They are checked many in one pass, which is faster where they
                    are right (`timings.draft_n_accepted`). The answer is the same with any draft, but
                    for a token that ties with another within the rounding of the weights' type.
                n_forced: so many of the draft's first tokens are the answer's, whatever the model
                    would choose; `Reply.n_overruled` counts where that was another. Not with a grammar.
                logprobs: fill `Reply.logprobs`: the natural log of each token's probability under the
                    model, before temperature, penalties, bias and grammar; ids without a token do not count.
                top_logprobs: fill `Reply.top_logprobs` too: so many of the most probable tokens in the
                    place of each, 0 to 100.
                stop_ids: token ids that end the answer beside the model's own.

        Raises:
            InputError: a message, tool or setting that cannot be used, or too long a prompt.
            KernelError: the engine failed, or an adapter was asked for that does not act.
        """
        parsed = parse(messages)
        tools = options.get("tools")
        if tools is not None:
            tools = parse_tools(
                tools if isinstance(tools, str) else json.dumps(list(tools), ensure_ascii=False)
            )
        pieces = render(
            parsed, self.bundle.chat_format, tools=tools, tool_result_token=self.bundle.tool_result_token
        )
        return self._answer_to(pieces, options, stream, with_tools=tools is not None)

    @overload
    def complete(
        self, prompt: str, *, stream: Literal[False] = False, **options: Unpack[CompleteOptions]
    ) -> Reply: ...
    @overload
    def complete(
        self, prompt: str, *, stream: Literal[True], **options: Unpack[CompleteOptions]
    ) -> Answer: ...
    def complete(
        self, prompt: str, *, stream: bool = False, **options: Unpack[CompleteOptions]
    ) -> Reply | Answer:
        """Continue a prompt written out in the model's own markup: here `<|user|>` is the control token.

        Arguments and errors are those of `chat`. Never pass text from someone else through this.
        """
        pieces = parse_raw(prompt, self.tokenizer.control_tokens, options.get("media", ()))
        return self._answer_to(pieces, options, stream, with_tools=True)

    def next_token_logits(self, prompt: str, *, adapter: AdapterName | None = None) -> Float32:
        """Logits after a prompt in the model's own markup: float32 [vocab_size], unmasked."""
        self._end_answer()
        request = self._request(parse_raw(prompt, self.tokenizer.control_tokens), {"adapter": adapter}, False)
        return self._session.read(request.spans, adapter=request.adapter)[0]

    def token_logits(
        self, ids: Iterable[int], n: int, *, adapter: AdapterName | None = None, prompt: Sequence[Piece] = (),
        within: int = 0,
    ) -> Float32:  # fmt: skip
        """Logits after each of the last `n` tokens of a sequence, which replaces the conversation.

        Args:
            ids: token ids. No BOS is added; what the KV cache holds of the same sequence is not read again.
            n: 1 to t, the tokens of the sequence, at most `context_limit`. The RoPE table is the one for t.
            adapter: read everything through this LoRA; None: as the prompt is routed, ids alone through none.
            prompt: comes before the ids, media and all.
            within: the sequence begins one of so many tokens, if those are more: it has the table for those.

        Returns:
            float32 [n, vocab_size], unmasked, in natural-log units: 205 MB for 256 rows of Phi-4-mini's.

        Raises:
            InputError: an id, `n` or adapter out of range, or more tokens than the context holds.
            KernelError: the engine failed, or the adapter does not act.
        """
        self._end_answer()
        request = self._request(prompt, {"adapter": adapter}, False)
        sequence = [*request.spans, TokenSpan(self._ids("token ids", ids))]
        total = sum(map(len, sequence))
        if not 1 <= n <= total:
            raise InputError(f"logits of {n} of {total} tokens are asked for, expected 1 to all of them")
        found = [span for span in sequence if len(span)]
        return self._session.read_each(found, n, adapter=request.adapter, within=within)

    def run_through(
        self, prompt: Sequence[Piece] | Int32, *, adapter: AdapterName | None = None
    ) -> tuple[int, str | None]:
        """Read a prompt anew, every layer for every token, and forget it: for the observer.

        Args:
            prompt: pieces, routed as `complete` does it, or token ids, which go through no adapter unasked.
            adapter: as for `complete`.

        Returns:
            how many tokens were read, and the adapter that was set for them.

        Raises:
            InputError: as for `complete` and `token_logits`.
        """
        self._end_answer()
        if isinstance(prompt, np.ndarray):
            _check_adapter(adapter)
            found, lora = [TokenSpan(self._ids("token ids", prompt))], self._lora(adapter)
            return self._session.run_through(found, adapter=lora), lora
        request = self._request(prompt, {"adapter": adapter}, False)
        return self._session.run_through(request.spans, adapter=request.adapter), request.adapter

    def _request(self, pieces: Sequence[Piece], options: CompleteOptions, with_tools: bool) -> Request:
        max_tokens, adapter = options.get("max_tokens"), options.get("adapter")
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max tokens is {max_tokens}, expected at least 1")
        _check_adapter(adapter)
        top_logprobs = options.get("top_logprobs", 0)
        if not 0 <= top_logprobs <= _MOST_TOP_LOGPROBS:
            raise InputError(f"top logprobs is {top_logprobs}, expected 0 to {_MOST_TOP_LOGPROBS}")
        draft, n_forced = self._draft(options)
        stop_ids = self._ids("stop ids", options.get("stop_ids", ()))
        media = [piece.media for piece in pieces if isinstance(piece, Slot)]
        kinds = {one.kind for one in media}
        routed = route(images="image" in kinds, audio="audio" in kinds)
        chosen = adapter or routed.adapter
        self._guard.media(media, self._lora(chosen), self.resident)
        started = time.perf_counter()
        found = spans(pieces, self.tokenizer, lambda m: self._embed(m, routed.audio_projector))
        self._guard.rows = sum(map(len, found))
        return Request(
            spans=found,
            mode=_MODE_OF_ADAPTER[adapter] if adapter and not kinds else routed.mode,
            adapter=self._lora(chosen),
            max_tokens=max_tokens,
            stop_ids=frozenset(self.bundle.stop_ids).union(stop_ids.tolist()),
            with_tools=with_tools,
            draft=draft,
            n_forced=n_forced,
            logprobs=options.get("logprobs", False) or top_logprobs > 0,
            top_logprobs=top_logprobs,
            encode_ms=(time.perf_counter() - started) * 1e3 if kinds else 0.0,
        )

    def _lora(self, adapter: str | None) -> str | None:
        """The adapter that has to be set: none where it is merged into the backbone."""
        return None if adapter == self.bundle.merged else adapter

    def _draft(self, options: CompleteOptions) -> tuple[Int32, int]:
        draft, n_forced = self._ids("draft", options.get("draft", ())), options.get("n_forced", 0)
        sampling = options.get("sampling") or Sampling()
        if not 0 <= n_forced <= len(draft):
            raise InputError(f"forced tokens is {n_forced}, expected 0 to the draft's {len(draft)}")
        if n_forced and sampling.is_constrained:
            raise InputError("forced tokens and a grammar or JSON schema are given, expected at most one")
        if np.isin(draft[:n_forced], self.tokenizer.unassigned_ids).any():
            raise InputError("draft: an id that is to be forced names no token")
        return draft, n_forced

    def _ids(self, name: str, ids: Iterable[int]) -> Int32:
        found, size = list(ids), self.bundle.text.vocab_size
        if not all(isinstance(i, (int, np.integer)) and 0 <= i < size for i in found):
            raise InputError(f"{name}: expected whole numbers from 0 to {size - 1}")
        return np.array(found, np.int32)

    def _embed(self, media: Media, projector: AudioProjector | None) -> EmbedSpan:
        return self._parts.embed(media, projector)

    def _answer_to(
        self, pieces: Sequence[Piece], options: CompleteOptions, stream: bool, *, with_tools: bool
    ) -> Reply | Answer:
        self._end_answer()
        self._notes = []
        request = self._request(pieces, options, with_tools)
        reasoning = self.bundle.chat_format == "phi4-mini-reasoning"
        sampling = options.get("sampling") or Sampling()
        vocab = self._backbone.vocab(self._decoder) if sampling.is_constrained else None
        self._answer = Answer(
            request,
            self._session,
            GgmlSampler(sampling, vocab, self.bundle.text.vocab_size, self.tokenizer.unassigned_ids),
            TextStream(self.tokenizer, stop=options.get("stop", ()), reasoning=reasoning),
            self.tokenizer,
            load_ms=self._load_ms,
            notes=self._notes,
            resident=lambda: self.resident,
        )
        if not stream:
            for _ in self._answer:
                pass
            return self._answer.reply
        return self._answer

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _note(self, line: str) -> None:
        self._notes.append(line)
        _log.warning("%s", line)


def _check_adapter(adapter: str | None) -> None:
    if adapter is not None and adapter not in _MODE_OF_ADAPTER:
        known = ", ".join(_MODE_OF_ADAPTER)
        raise InputError(f"adapter is {str(adapter)[:40]!r}, expected one of {known}")
