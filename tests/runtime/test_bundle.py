# SPDX-License-Identifier: Apache-2.0
"""The manifest: a round trip, and every way of being wrong in one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.errors import BundleError
from pocketphi.runtime.spec import RopeSpec, TextSpec

ROPE = RopeSpec(4, 10000.0, 256, 1.19, (1.0, 1.0), (1.0, 8.0))
TEXT = TextSpec(32, 2, 4, 2, 8, 64, 100, 1024, 1e-5, True, ROPE)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with two files and a true manifest."""
    files = []
    for name, content in (("backbone.gguf", b"weights"), ("tokenizer.json", b"{}")):
        (tmp_path / name).write_bytes(content)
        digest = bundles.sha256_of(tmp_path / name)
        files.append(bundles.BundleFile(name, len(content), digest))
    made = bundles.Bundle(
        root=tmp_path, name="m", family="phi3", chat_format="phi4-mini", tool_result_token="<|tool|>",
        text=TEXT, stop_ids=(7,), decoder="backbone.gguf", recipe="F16", quant={"ffn_up": "F16"}, merged=None,
        adapters={}, tokenizer="tokenizer.json", source=bundles.Source("m", None, "00"),
        converter="pocketphi 0", licence="mit", files=tuple(files),
    )  # fmt: skip
    (tmp_path / bundles.MANIFEST).write_text(made.to_json(), "utf-8")
    return tmp_path


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = directory / bundles.MANIFEST
    raw = json.loads(manifest.read_text("utf-8"))
    del raw["sha256"]  # of the manifest itself
    change(raw)
    manifest.write_text(json.dumps(raw), "utf-8")


def test_round_trip(directory: Path) -> None:
    loaded = bundles.load(directory)
    assert loaded.text == TEXT
    assert loaded.to_json() == (directory / bundles.MANIFEST).read_text("utf-8")
    assert [f.path for f in loaded.check_hashes()] == ["backbone.gguf", "tokenizer.json"]


def test_every_flipped_bit_of_the_manifest_is_found(directory: Path) -> None:
    """But for those that take the checksum's own name away: what is left says what it said."""
    manifest = directory / bundles.MANIFEST
    whole, text = manifest.read_bytes(), bundles.load(directory).to_json()
    name = whole.index(b'"sha256": ', whole.index(b'"recipe"'))
    for bit in range(8 * len(whole)):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(raw)
        if name < bit // 8 <= name + len("sha256"):
            with contextlib.suppress(BundleError):
                assert bundles.load(directory).to_json() == text
            continue
        with pytest.raises(BundleError, match=r"bundle\.json"):
            bundles.load(directory)


def test_a_manifest_without_a_checksum_is_somebodys_own(directory: Path) -> None:
    edit(directory, lambda raw: raw.update(name="mine"))
    assert bundles.load(directory).name == "mine"


def test_a_changed_file_of_the_same_size_is_found_by_its_hash(directory: Path) -> None:
    (directory / "backbone.gguf").write_bytes(b"weightz")
    with pytest.raises(BundleError, match="SHA-256"):
        list(bundles.load(directory).check_hashes())


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda r: r.update(version=2), "version 2"),
    "format": (lambda r: r.update(format="x"), "not a pocketphi-bundle"),
    "size": (lambda r: r["files"][0].update(size=8), "bytes"),
    "absolute path": (lambda r: r["files"][0].update(path="/etc/passwd"), "inside the directory"),
    "climbing path": (lambda r: r["files"][0].update(path="../x"), "inside the directory"),
    "backslash path": (lambda r: r.update(decoder="a\\b"), "inside the directory"),
    "drive": (lambda r: r.update(tokenizer="c:x"), "inside the directory"),
    "NUL": (lambda r: r.update(tokenizer="a\0b"), "control characters"),
    "unlisted decoder": (lambda r: r.update(decoder="other.gguf"), "list of files"),
    "missing file": (lambda r: r["files"].append({"path": "gone", "size": 1, "sha256": ""}), "missing"),
    "wrong type": (lambda r: r.update(name=3), "a string"),
    "boolean for a number": (lambda r: r["text"].update(n_heads=True), "whole number"),
    "negative": (lambda r: r["text"].update(d_ff=-1), "from 0"),
    "zero layers": (lambda r: r["text"].update(n_layers=0), "zero"),
    "factor count": (lambda r: r["text"]["rope"].update(long_factor=[1.0]), "factors"),
    "one table": (lambda r: r["text"]["rope"].update(long_factor=None), "only one"),
    "factor type": (lambda r: r["text"]["rope"].update(long_factor=["a", "b"]), "not a number above 0"),
    "stop id range": (lambda r: r.update(stop_ids=[100]), "below 100"),
    "no stop id": (lambda r: r.update(stop_ids=[]), "below 100"),
    "unknown adapter": (lambda r: r.update(adapters={"smell": {}}), "smell"),
    "unknown chat format": (lambda r: r.update(chat_format="x"), "expected one of"),
    "no text": (lambda r: r.pop("text"), "object"),
    "NaN": (lambda r: r["text"].update(rms_eps=float("nan")), "above 0"),
    "zero scale": (lambda r: r["text"]["rope"].update(attention_factor=0), "above 0"),
    "huge integer": (lambda r: r["text"]["rope"].update(theta=10**400), "above 0"),
    "unknown merge": (lambda r: r.update(merged="smell"), "merged"),
    "control characters": (lambda r: r.update(name="a\x1b[2Jb"), "control characters"),
    "long name": (lambda r: r["files"][0].update(path="x" * 300), "inside the directory"),
    "files no list": (lambda r: r.update(files={}), "a list"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bad_manifest_is_one_line(directory: Path, name: str) -> None:
    change, want = CHANGES[name]
    edit(directory, change)
    with pytest.raises(BundleError, match=want) as caught:
        bundles.load(directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000, b'"' + b"x" * (5 << 20) + b'"']
)
def test_a_manifest_that_is_no_manifest(directory: Path, raw: bytes) -> None:
    (directory / bundles.MANIFEST).write_bytes(raw)
    with pytest.raises(BundleError) as caught:
        bundles.load(directory)
    assert "\n" not in str(caught.value)


def test_no_directory_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such"):
        bundles.load(tmp_path / "gone")
    with pytest.raises(BundleError, match="pocketphi convert"):
        bundles.load(tmp_path)


def test_a_link_out_of_the_directory(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "weights"
    outside.write_bytes(b"weights")
    (directory / "backbone.gguf").unlink()
    (directory / "backbone.gguf").symlink_to(outside)
    with pytest.raises(BundleError, match="outside"):
        bundles.load(directory)
