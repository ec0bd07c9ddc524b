# SPDX-License-Identifier: Apache-2.0
"""How well a model foresees the reference answers of items, and how far it is from a base model there.

A prompt with its media is read as it is asked, through the adapter that the router chooses; then the tokens
of the reference, each where the model would have to say it. Scored are all tokens of the reference, control
tokens of its markup among them, and the one that ends the turn in the model's chat format (`<|end|>`, of
Phi-4 14B `<|im_end|>`), once: a reference that ends with it brings its own. An empty reference is that one.

    ppl     exp of the mean of -ln p of these tokens
    kld     the mean of Σ p_base · (ln p_base - ln p) at their places, in nats

An id without a token can never be said and has no share in p, as in `Reply.logprobs`. The reference is made
into tokens on its own, not together with what a prompt ends in. All of a sequence is read with the RoPE table
that its whole length needs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..runtime.bundle import Bundle
from ..runtime.engine import Model
from ..runtime.errors import InputError
from ..runtime.parts import Float32, Int32, Message
from ..runtime.prompt import Control, Piece, Slot, parse_raw, render
from .bootstrap import Float64
from .items import Item, in_order_of_modes
from .journal import Answered, Took

_PASS_ROWS = 256  # logits of one model in memory at once: 205 MB of Phi-4-mini's
_BLOCK_VALUES = 1 << 18  # worked on at once: one row of Phi-4-mini's
_NEVER = -1e30  # a logit: e to it is 0, and differences of such stay finite


def check_base(model: Bundle, base: Bundle) -> None:
    """Whether two models are conversions of one checkpoint.

    Raises:
        InputError: they are not; says what differs.
    """
    for what, wanted, found in (
        ("vocabulary size", model.text.vocab_size, base.text.vocab_size),
        ("checkpoint fingerprint", model.source.fingerprint[:16], base.source.fingerprint[:16]),
    ):
        if wanted != found:
            raise InputError(f"{base.root}: base has {what} {found}, expected {wanted} as in {model.root}")


def likelihoods(
    model: Model,
    items: Sequence[Item],
    *,
    base: Model | None = None,
    done: Mapping[str, Answered] | None = None,
) -> Iterator[tuple[Item, Answered]]:
    """Read what is not done yet, by mode, so that every adapter is switched to once.

    Args:
        model: its conversation is lost.
        items: in any order.
        base: compare with it; of the same checkpoint (see `check_base`).
        done: of these items nothing is read.

    Yields:
        of each item what was found at each position. Its `hypothesis` is the model's most likely token at
        each, put together: what it would have said, were it set right after every token.

    Raises:
        InputError: an item that the model cannot take, or whose medium is damaged; names it.
        KernelError: llama.cpp failed.
    """
    for item in in_order_of_modes(items):
        if done is None or item.id not in done:
            try:
                found = _measured(model, base, item)
            except InputError as exc:
                raise InputError(f"{item.where}: {exc}") from None
            yield item, found


def _measured(model: Model, base: Model | None, item: Item) -> Answered:
    started = time.perf_counter()
    prompt, ids = item_prompt(model, item), reference_ids(model, item.reference)
    unassigned, base_passes = model.tokenizer.unassigned_ids, None
    if base is not None:
        base_passes = predictions(base, prompt, ids)
    tops: list[int] = []
    found: dict[str, list[float]] = {}
    for logits in predictions(model, prompt, ids):
        of_base = None if base_passes is None else next(base_passes)
        step = max(1, _BLOCK_VALUES // logits.shape[1])
        for k in range(0, len(logits), step):
            ln_p = log_probabilities(logits[k : k + step], unassigned)
            ln_base = None if of_base is None else log_probabilities(of_base[k : k + step], unassigned)
            following = ids[len(tops) : len(tops) + len(ln_p)]
            tops += ln_p.argmax(1).tolist()
            for name, values in figures(ln_p, following, ln_base).items():
                found.setdefault(name, []).extend(values.tolist())
    read = model.context_used * (1 if base is None else 2)
    took = Took(0.0, read, (time.perf_counter() - started) * 1e3, 0, 0.0, 0.0)  # encoders with the decoder
    positions = {name: tuple(values) for name, values in found.items()}
    return Answered(item.id, model.tokenizer.decode(tops), "reference", took, positions)


def item_prompt(model: Model, item: Item) -> list[Piece]:
    """What an item asks, as `Model.complete` and `Model.chat` read it."""
    if item.prompt is not None:
        return parse_raw(item.prompt, model.tokenizer.control_tokens, item.media)
    bundle = model.bundle
    return render(
        item.messages, bundle.chat_format, tools=item.tools, tool_result_token=bundle.tool_result_token
    )


def reference_ids(model: Model, reference: str) -> Int32:
    """The tokens that are scored: int32 [n], n >= 1, those of the reference and the end of the turn.

    Raises:
        InputError: it has a place for a picture or a clip.
    """
    turn = render([Message("assistant", "")], model.bundle.chat_format, answer=False)
    end = [piece for piece in turn if isinstance(piece, Control)][-1]
    markup = parse_raw(reference, model.tokenizer.control_tokens)
    pieces = [piece for piece in markup if not isinstance(piece, Slot)]  # all: it has no media
    return model.tokenizer.encode(pieces if pieces[-1:] == [end] else [*pieces, end])


def predictions(model: Model, prompt: Sequence[Piece], ids: Int32) -> Iterator[Float32]:
    """What the model expects in the places of `ids` after a prompt.

    Yields:
        float32 [k, vocab_size], logits for the next k of them.

    Raises:
        InputError: the prompt cannot be used, or both are longer than the context.
    """
    model.forget()
    logits, table = model.token_logits((), 1, prompt=prompt), model.bundle.text.rope.table
    last, done = len(ids) - 1, 0  # nothing follows the last: it is not read
    within = model.context_used + last
    if table(model.context_used) != table(within):
        model.forget()
        logits = model.token_logits((), 1, prompt=prompt, within=within)
    yield logits
    while done < last:
        more = min(_PASS_ROWS, last - done)
        yield model.token_logits(ids[: done + more], more, prompt=prompt, within=within)
        done += more


def log_probabilities(logits: Float32, unassigned: Int32) -> Float64:
    """ln p of every id, float32 [n, vocab_size] to float64; finite also for ids without a token: p is 0."""
    found = logits.astype(np.float64)
    found[:, unassigned] = _NEVER
    found -= found.max(1, keepdims=True)
    found -= np.log(np.exp(found).sum(1, keepdims=True))
    return found


def figures(ln_p: Float64, following: Int32, ln_base: Float64 | None = None) -> dict[str, Float64]:
    """The columns of some positions, float64 [n] each; see `likelihood_judge.COLUMNS`.

    Args:
        ln_p: float64 [n, vocab_size].
        following: int32 [n], what the reference has there.
        ln_base: float64 [n, vocab_size], the base's.
    """
    rows = np.arange(len(following))
    nll = -ln_p[rows, following]
    if ln_base is None:
        return {"nll": nll}
    return {
        "nll": nll,
        "nll_base": -ln_base[rows, following],
        "kld": (np.exp(ln_base) * (ln_base - ln_p)).sum(1),
        "same_top": (ln_p.argmax(1) == ln_base.argmax(1)).astype(np.float64),
    }
