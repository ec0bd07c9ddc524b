# SPDX-License-Identifier: Apache-2.0
"""Whole conversions: same input same bytes, every layout and dtype, and nothing left behind by a failure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.convert import Options, convert, plan
from pocketphi.convert.licence import licence_of
from pocketphi.runtime import bundle
from pocketphi.runtime.errors import CheckpointError, InputError, OutputError, PocketPhiError
from pocketphi.runtime.gguf_header import read_header

from .. import tiny
from ..tiny import NANO
from ..tiny_files import DType


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def tensor_bytes(path: Path) -> dict[str, bytes]:
    """Each tensor's data, up to where the next begins."""
    file, raw = read_header(path), path.read_bytes()
    starts = [*sorted(t.offset for t in file.tensors.values()), len(raw)]
    return {t.name: raw[t.offset : starts[starts.index(t.offset) + 1]] for t in file.tensors.values()}


@pytest.mark.parametrize(
    "options", [Options(), Options(merge="speech", recipe="Q4_0")], ids=["plain", "merged"]
)
def test_same_input_same_bytes_on_any_number_of_threads(options: Options, tmp_path: Path) -> None:
    made: list[dict[str, bytes]] = []
    for threads in (None, None, 1, 2, 7):
        out = tmp_path / str(len(made))
        convert(NANO, out, Options(options.recipe, merge=options.merge, threads=threads))
        made.append(contents(out))
    assert all(one == made[0] for one in made[1:])


def test_the_bundle_is_whole(tmp_path: Path) -> None:
    made = convert(NANO, tmp_path / "out", Options(source_name="someone/phi4-nano", revision="abc123"))
    assert made.root == tmp_path / "out" and len(list(made.check_hashes())) == len(made.files)
    listed = {f.path for f in made.files}
    assert listed | {bundle.MANIFEST} == set(contents(made.root))
    assert {name for name in listed if ".onnx" not in name} == {
        "backbone-Q4_K_M.gguf",
        "vision-Q8_0-LoRA.gguf",
        "speech-Q8_0-LoRA.gguf",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert (made.name, made.family, made.chat_format) == ("phi4-nano", "phi4-multimodal", "phi4-mini")
    assert (made.source.name, made.source.revision) == ("someone/phi4-nano", "abc123")
    assert made.stop_ids == (2853, 2848) and made.licence == "unknown"
    assert made.quant == {
        "token_embd": "Q6_K",
        "attn_qkv": "Q6_K",
        "attn_output": "Q4_K",
        "ffn_up": "Q4_K",
        "ffn_down": "Q5_K+Q6_K",
        "norm": "F32",
        "rope": "F32",
    }
    assert (made.root / "tokenizer.json").read_bytes() == (NANO / "tokenizer.json").read_bytes()


def test_both_layouts_give_the_same_tensors(tmp_path: Path) -> None:
    original = tiny.nano_original(tmp_path / "original")
    for name, source in (("ours", NANO), ("theirs", original)):
        convert(source, tmp_path / name, Options())
    for file in ("backbone-Q4_K_M.gguf", "vision-Q8_0-LoRA.gguf", "speech-Q8_0-LoRA.gguf"):
        assert tensor_bytes(tmp_path / "ours" / file) == tensor_bytes(tmp_path / "theirs" / file)


@pytest.mark.parametrize("member", tiny.MEMBERS)
def test_every_dtype_and_number_of_files(member: tiny.Member, tmp_path: Path) -> None:
    """tests/tiny.py writes the same numbers whatever the dtype."""
    found = []
    variants: list[tuple[DType, int]] = [("bf16", 1), ("f16", 3), ("f32", 2)]
    for dtype, shards in variants:
        source = tiny.write(member, tmp_path / f"{dtype}-in", dtype=dtype, shards=shards)
        made = convert(source, tmp_path / dtype, Options(recipe="Q5_K_M"))
        found.append([tensor_bytes(made.path(f.path)) for f in made.files if f.path.endswith(".gguf")])
    assert found[0] == found[1] == found[2]


# -- failures leave nothing ------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint to break: phi4-mini in tiny."""
    return tiny.write("phi4-mini", tmp_path / "source")


def refused(source: Path, out: Path, error: type[PocketPhiError], options: Options | None = None) -> str:
    before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(error) as caught:
        convert(source, out, options or Options())
    assert sorted(p.name for p in out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewritten(source: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    weights = tiny.tensors("phi4-mini")
    change(weights)
    tiny.save_tensors(source / "model.safetensors", weights, "f32", metadata=None)
    return source


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_impossible_weights_are_named(copy: Path, tmp_path: Path, name: str, bad: float) -> None:
    def spoil(weights: dict[str, Any]) -> None:
        weights[name] = weights[name].copy()
        weights[name].reshape(-1)[-1] = bad

    if name == "model.norm.weight" and bad == 1e6:
        convert(rewritten(copy, spoil), tmp_path / "out", Options())  # F32 holds it
        return
    message = refused(rewritten(copy, spoil), tmp_path / "out", CheckpointError)
    assert repr(name) in message and "model.safetensors" in message


def test_a_tied_head_must_repeat_the_embedding(copy: Path, tmp_path: Path) -> None:
    def repeat(weights: dict[str, Any]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()

    def differ(weights: dict[str, Any]) -> None:
        repeat(weights)
        weights["lm_head.weight"][-1, -1] += 1

    plain = convert(copy, tmp_path / "plain", Options())
    repeated = convert(rewritten(copy, repeat), tmp_path / "repeated", Options())
    file = plain.decoder
    assert tensor_bytes(plain.path(file)) == tensor_bytes(repeated.path(file))
    assert "differs from the embedding" in refused(rewritten(copy, differ), tmp_path / "out", CheckpointError)
    with pytest.raises(CheckpointError, match="differs"):
        plan(copy, Options())


class Interrupt:
    """A Progress that stops the work after some pieces, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, total_bytes: int, what: str) -> None: ...

    def advance(self, n_bytes: int, what: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def finish(self) -> None:
        pytest.fail("finished")


@pytest.mark.parametrize("after", [1, 20, 60])
def test_an_interrupt_leaves_nothing_and_a_second_try_works(tmp_path: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(NANO, tmp_path / "out", Options(), Interrupt(after))
    assert list(tmp_path.iterdir()) == []
    convert(NANO, tmp_path / "out", Options())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Counter:
    def __init__(self) -> None:
        self.total, self.done, self.finished = 0, 0, False

    def start(self, total_bytes: int, what: str) -> None:
        self.total = total_bytes

    def advance(self, n_bytes: int, what: str) -> None:
        self.done += n_bytes
        assert what and self.done <= self.total

    def finish(self) -> None:
        self.finished = True


def test_progress_adds_up(copy: Path, tmp_path: Path) -> None:
    told = Counter()
    convert(copy, tmp_path / "out", Options(), told)
    planned = plan(copy, Options())
    assert told.finished and told.total == planned.tensor_bytes
    assert told.done == sum(s.nbytes for s in planned.steps)


def test_an_output_that_is_there(tmp_path: Path) -> None:
    made = convert(NANO, tmp_path / "out", Options(recipe="Q8_0"))
    assert "not empty" in refused(NANO, tmp_path / "out", OutputError)
    again = convert(NANO, tmp_path / "out", Options(recipe="Q4_0", overwrite=True))
    assert (made.recipe, again.recipe) == ("Q8_0", "Q4_0")
    assert not (again.root / made.decoder).exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (Options(recipe="Q3_K"), "Q3_K"),
        (Options(lora_quant="Q4_K"), "Q4_K"),
        (Options(merge="text"), "text"),
        (Options(threads=0), "threads"),
        (Options(chat_format="llama"), "llama"),
        (Options(name="two\nlines"), "name"),
        (Options(source_name="x" * 1000), "source name"),
        (Options(name="\udcff"), "name"),
    ],
)
def test_options_that_cannot_be(options: Options, match: str, tmp_path: Path) -> None:
    assert match in refused(NANO, tmp_path / "out", InputError, options)


def test_a_native_model_without_adapters_is_text_only(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(NANO, source, ignore=shutil.ignore_patterns("*-lora"))
    assert "no vision and speech adapter" in plan(source, Options()).format()
    assert convert(source, tmp_path / "out", Options()).adapters == {}


def test_a_changed_configuration_does_not_fit_the_tensors(copy: Path, tmp_path: Path) -> None:
    raw = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 3}), "utf-8")
    assert "'model.layers.2." in refused(copy, tmp_path / "out", CheckpointError)


def test_a_template_that_is_not_text(copy: Path, tmp_path: Path) -> None:
    raw = json.loads((copy / "tokenizer_config.json").read_text("utf-8"))
    raw["chat_template"] += "\udcff"
    (copy / "tokenizer_config.json").write_text(json.dumps(raw), "utf-8")
    assert "template" in refused(copy, tmp_path / "out", CheckpointError)


def test_licences(copy: Path, tmp_path: Path) -> None:
    (copy / "LICENSE").write_text("    MIT License\n\nCopyright (c) Microsoft Corporation.\n", "utf-8")
    made = convert(copy, tmp_path / "out", Options())
    assert made.licence == "MIT" and (made.root / "LICENSE").read_text("utf-8").startswith("    MIT License")
    assert licence_of("---\nlanguage: en\nlicense: apache-2.0\n---\ntext", "MIT License") == "Apache-2.0"
    assert licence_of("license: mit", None) == "unknown"  # not in the front matter
    assert licence_of("---\nlicense: [x]\n---\n", "Microsoft.\nCopyright\n\nMIT License\n") == "MIT"
    assert licence_of(None, "   Apache License\n   Version 2.0, January 2004") == "Apache-2.0"
    assert (
        licence_of(None, "All rights reserved. This is not under the terms of the well known MIT License")
        == "unknown"
    )


def test_importing_convert_is_light() -> None:
    """The command line imports it for its options; numpy and gguf wait for a call."""
    script = "import sys, pocketphi.convert, pocketphi.convert.builtin\n"
    script += "assert not {'numpy', 'gguf', 'tokenizers', 'llama_cpp'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
