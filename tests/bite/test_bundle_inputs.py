# SPDX-License-Identifier: Apache-2.0
"""Model directories whose bundle.json lies, is another's, or points elsewhere."""

# ruff: noqa: E501  (one case a line reads as a table)
from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Bitten
from .table import Case, Place, seal

Make = Callable[[Place], list[str]]
Plain = dict[str, Any]
DELETED = object()


def asked(spoil: Callable[[Path], object], member: str = "phi4-mini", recipe: str = "Q8_0") -> Make:
    """`run` a model directory after `spoil` has had it."""

    def make(place: Place) -> list[str]:
        model = place.model(member, recipe)
        spoil(model)
        return ["run", "-m", str(model), "-p", "Hi", "-n", "2"]

    return make


def edited(change: Callable[[Plain], object], member: str = "phi4-mini") -> Make:
    """Change bundle.json's fields."""

    def spoil(model: Path) -> None:
        plain = json.loads((model / "bundle.json").read_text("utf-8"))
        del plain["sha256"]  # as who edits it does
        change(plain)
        (model / "bundle.json").write_text(json.dumps(plain), "utf-8")

    return asked(spoil, member)


def manifest(content: bytes) -> Make:
    """Other bytes in its place."""
    return asked(lambda model: (model / "bundle.json").write_bytes(content))


def given(path: str, value: object, member: str = "phi4-mini") -> Make:
    """One field: "text.rope.dims"."""

    def change(plain: Plain) -> None:
        *above, last = path.split(".")
        for name in above:
            plain = plain[name]
        if value is DELETED:
            del plain[last]
        else:
            plain[last] = value

    return edited(change, member)


def listed(change: Callable[[Plain], object]) -> Make:
    """Change the list's entry of the decoder."""
    return edited(lambda p: change(next(f for f in p["files"] if f["path"] == p["decoder"])))


def on_decoder(change: Callable[[Path], object]) -> Make:
    """Change the decoder's file; the list is not told."""
    return asked(lambda model: change(decoder_of(model)))


def decoder_of(model: Path) -> Path:
    return model / str(json.loads((model / "bundle.json").read_text("utf-8"))["decoder"])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def linked_out(path: Path) -> None:
    """The same bytes, outside the directory."""
    path.rename(path.parent.parent / "outside")
    path.symlink_to(path.parent.parent / "outside")


def replaced(make: Callable[[Path], object]) -> Make:
    def spoil(model: Path) -> None:
        decoder = decoder_of(model)
        decoder.unlink()
        make(decoder)

    return asked(spoil)


TEXTS = ["name", "family", "chat_format", "tool_result_token", "decoder", "recipe", "tokenizer", "converter", "licence",
         "source.name", "source.fingerprint"]  # fmt: skip
OBJECTS = ["text", "text.rope", "adapters", "quant", "source", "encoders"]
COUNTS = [f"text.{n}" for n in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size",
                                "context_length", "rope.dims", "rope.original_context")]  # fmt: skip
NUMBERS = ["text.rms_eps", "text.rope.theta", "text.rope.attention_factor"]
LISTS = ["stop_ids", "files"]


def field_cases() -> list[Case]:
    """Every field: missing, and of a wrong kind."""
    found = [
        Case(
            "decoder missing",
            given("decoder", DELETED),
            3,
            r"bundle\.json.*names no backbone, expected 'decoder'",
        )
    ]
    for name in [*TEXTS, *OBJECTS, *COUNTS, *NUMBERS, *LISTS, "text.tied_head"]:
        if name == "decoder":  # there may be an ONNX backbone instead
            continue
        last = name.rsplit(".", maxsplit=1)[-1]
        said = (
            rf"bundle\.json: .*{last}"
            if name in OBJECTS
            else rf"bundle\.json.*field '{last}' is 'None', expected"
        )
        found.append(Case(f"{name} missing", given(name, DELETED), 3, said))
    wrong: list[tuple[list[str], object]] = [
        (TEXTS, 3), (OBJECTS, [1]), (COUNTS, "3"), (COUNTS, -1), (COUNTS, True), (COUNTS, 1.5), (COUNTS, 1 << 64),
        (NUMBERS, 0), (NUMBERS, "1"), (LISTS, {}), (["text.tied_head"], 1), (["merged"], 3), (["merged"], "smell"),
    ]  # fmt: skip
    for names, value in wrong:
        found += [
            Case(
                f"{name} = {value!r}",
                given(name, value),
                3,
                r"bundle\.json.*" + name.rsplit(".", maxsplit=1)[-1],
            )
            for name in names
        ]
    return found


ESCAPES = ["../x", "/etc/passwd", "a/../../x", "..", "", "C:\\x", "a\\b", "x" * 256]
MANY = json.dumps({"format": "pocketphi-bundle", "version": 1, "x": "y" * (4 << 20)}).encode()
CASES = [
    Case("empty", manifest(b""), 3, r"bundle\.json: cannot be read as JSON"),
    Case("not JSON", manifest(b"{nonsense"), 3, r"bundle\.json: cannot be read as JSON"),
    Case("not UTF-8", manifest(b'{"a": "\xff"}'), 3, r"bundle\.json: cannot be read as JSON: .*utf-8"),
    Case("a list", manifest(b"[]"), 3, r"bundle\.json: is not a pocketphi-bundle manifest"),
    Case("a number", manifest(b"1"), 3, r"bundle\.json: is not a pocketphi-bundle manifest"),
    Case("deep", manifest(b"[" * 500_000), 3, r"bundle\.json: cannot be read as JSON: .*recursion"),
    Case("a number of 5,000 digits", manifest(b'{"format": 1' + b"0" * 5000 + b"}"), 3, r"bundle\.json: cannot be read"),
    Case("above 4 MB", manifest(MANY), 3, r"bundle\.json: \d+ bytes is too large for a manifest"),
    Case("another format", given("format", "x"), 3, r"bundle\.json: is not a pocketphi-bundle manifest"),
    Case("version 0", given("version", 0), 3, r"bundle\.json: has format version 0, expected 1: convert again"),
    Case("version 2", given("version", 2), 3, r"bundle\.json: has format version 2, expected 1: convert again"),
    Case("version text", given("version", "1"), 3, r"bundle\.json: has format version .?1.?, expected 1"),
    Case("a directory", asked(lambda m: ((m / "bundle.json").unlink(), (m / "bundle.json").mkdir())), 3,
         r"bundle\.json: is not a regular file"),
    Case("missing", asked(lambda m: (m / "bundle.json").unlink()), 3, r"model: not a model directory: it has no bundle"),
    Case("a FIFO", asked(lambda m: ((m / "bundle.json").unlink(), os.mkfifo(m / "bundle.json"))), 3, r"not a regular"),
    Case("a link to /dev/zero", asked(lambda m: ((m / "bundle.json").unlink(), (m / "bundle.json").symlink_to("/dev/zero"))),
         3, r"bundle\.json: is not a regular file"),
    Case("a control character", given("name", "a\x1b[31mb"), 3, r"bundle\.json: field 'name' holds control characters"),
    Case("half a surrogate pair", given("name", "a\ud800"), 3, r"bundle\.json: field 'name' holds"),
    Case("no stop ids", given("stop_ids", []), 3, r"bundle\.json: field 'stop_ids' must list ids below"),
    Case("a stop id of 2^31", given("stop_ids", [1 << 31]), 3, r"bundle\.json: field 'stop_ids' must list ids below"),
    Case("a stop id of -1", given("stop_ids", [-1]), 3, r"bundle\.json: field 'stop_ids' must list ids below"),
    Case("no family of that name", given("family", "phi5"), 3, r"bundle\.json: field 'family' is 'phi5', expected one of"),
    Case("no such chat format", given("chat_format", "x"), 3, r"bundle\.json: field 'chat_format' is 'x', expected one of"),
    Case("no such tool token", given("tool_result_token", "<|x|>"), 0, ""),
    Case("NaN", given("text.rms_eps", float("nan")), 3, r"bundle\.json: text: field 'rms_eps' is nan, expected"),
    Case("infinity", given("text.rope.theta", float("inf")), 3, r"bundle\.json: .*field 'theta' is inf, expected"),
    Case("1e999", given("text.rope.theta", 10**999), 3, r"bundle\.json: .*field 'theta' is 10+, expected"),
    Case("no layers", given("text.n_layers", 0), 3, r"bundle\.json: text: a size is zero"),
    Case("2^40 layers", given("text.n_layers", 1 << 40), 3, r"bundle\.json: text: field 'n_layers' is 1099511627776, expected at most 512"),
    Case("a vocabulary of 2^40", given("text.vocab_size", 1 << 40), 3, r"bundle\.json: text: field 'vocab_size' is 1099511627776, expected at most 16777216"),
    Case("a context of 2^52", given("text.context_length", 1 << 52), 3, r"bundle\.json: text: field 'context_length' is 4503599627370496, expected at most 2147483647"),
    Case("another width", given("text.d_model", 512), 3, r"\.gguf.*(embedding_length|512)"),
    Case("another rope base", given("text.rope.theta", 5.0), 3, r"\.gguf.*(rope|freq_base)"),
    Case("factors of another count", given("text.rope.long_factor", [1.0] * 32), 3, r"rope: has 32 factors for"),
    Case("one of two tables", given("text.rope.long_factor", None), 3, r"rope: has only one of short_factor and long_f"),
    Case("a factor of 0", given("text.rope.long_factor", [0.0] * 24), 3, r"'long_factor' holds something that is not a"),
    Case("a factor NaN", given("text.rope.long_factor", [float("nan")] * 24), 3, r"'long_factor' holds something that"),
    *(Case(f"decoder {p[:12]!r}", given("decoder", p), 3, r"field 'decoder' is .*expected a path inside") for p in ESCAPES),
    *(Case(f"file {p[:12]!r}", listed(lambda e, p=p: e.update(path=p)), 3, r"files: field 'path' is .*expected a path")
      for p in ESCAPES),
    Case("decoder not in the list", given("decoder", "x.gguf"), 3, r"'x\.gguf' is used but not in its list of files"),
    Case("decoder is the tokenizer", given("decoder", "tokenizer.json"), 3, r"tokenizer\.json: "),
    Case("tokenizer is the decoder", edited(lambda p: p.update(tokenizer=p["decoder"])), 3, r"\.gguf: cannot be read as a voc"),
    Case("an entry that is text", edited(lambda p: p["files"].append("x")), 3, r"files: expected an object"),
    Case("a file twice", edited(lambda p: p["files"].append(dict(p["files"][0]))), 3, r"bundle\.json: its list of files names one of them twice"),
    Case("a size of 2^60", listed(lambda e: e.update(size=1 << 52)), 3, r"has \d+ bytes, bundle\.json says 4503599627370496"),
    Case("a hash of another", listed(lambda e: e.update(sha256="0" * 64)), 3, r"SHA-256 is [0-9a-f]{16}…, bundle\.json says 0"),
    Case("a hash that is none", listed(lambda e: e.update(sha256="x")), 3, r"(SHA-256|sha256)"),
    Case("an adapter of another name", given("adapters", {"smell": {}}), 3, r"adapter 'smell' is not one of vision, speech"),
    Case("an encoder of another name", given("encoders", {"smell": {}}), 3, r"encoder 'smell' is not one of vision, speech"),
    Case("an adapter of rank 0", given("adapters.vision.rank", 0, "phi4-multimodal"), 3, r"adapter vision: field 'rank' is 0, expected a number above 0"),
    Case("an adapter with alpha 0", given("adapters.vision.alpha", 0, "phi4-multimodal"), 3, r"field 'alpha' is 0, expected"),
    Case("an adapter with alpha NaN", given("adapters.vision.alpha", float("nan"), "phi4-multimodal"), 3, r"'alpha' is nan"),
    Case("an encoder without its graphs", given("encoders.vision.graphs", {}, "phi4-multimodal"), 3, r"graphs.*field 'tower' is"),
    Case("an unlisted file", asked(lambda m: (m / "more.bin").write_bytes(b"x")), 0, r""),
    Case("an unknown field", given("more", {"a": 1}), 0, r""),
    Case("a file missing", on_decoder(Path.unlink), 3, r"\.gguf: listed in bundle\.json but missing"),
    Case("a file cut", on_decoder(lambda p: p.write_bytes(p.read_bytes()[:-1])), 3, r"\.gguf: has \d+ bytes, bundle\.json says"),
    Case("a file one longer", on_decoder(lambda p: p.write_bytes(p.read_bytes() + b"x")), 3, r"\.gguf: has \d+ bytes, bundle"),
    Case("a bit flipped", on_decoder(flip), 3, r"\.gguf: SHA-256 is [0-9a-f]{16}…, bundle\.json says"),
    Case("a link out of it", on_decoder(linked_out), 3, r"\.gguf: points outside the model directory"),
    Case("a link to itself", replaced(lambda p: p.symlink_to(p)), 3, r"\.gguf: "),
    Case("a link to /dev/zero", replaced(lambda p: p.symlink_to("/dev/zero")), 3, r"\.gguf: is not a regular file"),
    Case("a FIFO for a file", replaced(os.mkfifo), 3, r"\.gguf: is not a regular file"),
    Case("a directory for a file", replaced(lambda p: p.mkdir()), 3, r"\.gguf: is not a regular file"),
    Case("no such directory", lambda place: ["run", "-m", "gone", "-p", "x"], 3, r"gone: no such model directory"),
    Case("a file for the directory", lambda place: ["run", "-m", str(place.write("m", b"")), "-p", "x"], 3, r"m: no such model"),
    Case("an empty directory", lambda place: ["run", "-m", str(place.path), "-p", "x"], 3, r"it has no bundle\.json. Make one"),
    Case("a checkpoint", lambda place: ["run", "-m", str(place.checkpoint()), "-p", "x"], 3, r"it has no bundle\.json. Make one"),
    Case("info of a damaged one", lambda place: ["info", *asked(flipped_and_sealed)(place)[2:3]], 0, ""),
    Case("check of a damaged one", lambda place: ["info", "--check", *on_decoder(flip)(place)[2:3]], 3, r"SHA-256 is"),
]  # fmt: skip


def flipped_and_sealed(model: Path) -> None:
    flip(decoder_of(model))
    seal(model)


@pytest.mark.parametrize("case", field_cases(), ids=lambda case: case.id)
def test_a_field(case: Case, bitten: Bitten) -> None:
    bitten(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_model_directory(case: Case, bitten: Bitten) -> None:
    bitten(case)
