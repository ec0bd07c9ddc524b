# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds once open, exact widening of every bit pattern, reads from many threads."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.runtime.errors import CheckpointError

from .handmade import ADAPTER, INDEX, put, sharded, single, weights, with_adapter

NANO = Path(__file__).parents[2] / "nano" / "checkpoint"


# -- what is read --------------------------------------------------------------------------------


def test_nano() -> None:
    with Checkpoint.open(NANO) as checkpoint:
        assert checkpoint.name == "checkpoint"
        assert checkpoint.config["model_type"] == "phi4_multimodal"
        assert checkpoint.generation_config["eos_token_id"]
        assert len(checkpoint.tensors) == 351
        assert {n: (a.config["r"], len(a.tensors)) for n, a in checkpoint.adapters.items()} == {
            "vision": (32, 32),  # 4 layers of 4 linears with A and B
            "speech": (64, 32),
        }
        assert json.loads(checkpoint.tokenizer_json)["model"]["type"] == "BPE"
        assert checkpoint.chat_template == (NANO / "chat_template.jinja").read_text("utf-8")
        embedding = checkpoint.tensors["model.embed_tokens.weight"]
        raw = (NANO / "model.safetensors").read_bytes()[embedding.offset :][: embedding.nbytes]
        want = np.frombuffer(raw, ml_dtypes.bfloat16).astype(np.float32).reshape(4096, 256)
        assert (checkpoint.read(embedding) == want).all()


def test_single_and_sharded(tmp_path: Path) -> None:
    with (
        Checkpoint.open(single(tmp_path / "single")) as one,
        Checkpoint.open(sharded(tmp_path / "sharded")) as two,
    ):
        assert (one.name, set(one.tensors)) == ("single", {"a", "b"})
        assert {n: t.file.name for n, t in two.tensors.items()} == {
            "a": "one.safetensors",
            "b": "one.safetensors",
            "c": "two.safetensors",
        }
        assert (two.read(two.tensors["c"]) == np.ones((2, 3), np.float32)).all()
        for absent in (one.generation_config, one.tokenizer_config, one.adapters):
            assert absent == {}
        assert one.chat_template is None and one.licence_text is None


def test_the_index_wins_when_it_names_the_single_file(tmp_path: Path) -> None:
    root = single(tmp_path / "c")
    put(root / INDEX, {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}})
    with Checkpoint.open(root) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}


def test_a_cache_snapshot_of_links(tmp_path: Path) -> None:
    real = sharded(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    with Checkpoint.open(snapshot) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b", "c"}


def test_adapter(tmp_path: Path) -> None:
    with Checkpoint.open(with_adapter(tmp_path / "c")) as checkpoint:
        adapter = checkpoint.adapters["vision"]
        assert (adapter.name, adapter.config, set(checkpoint.tensors)) == ("vision", ADAPTER, {"a", "b"})
        assert checkpoint.read(adapter.tensors["x.lora_A.weight"]).shape == (2, 3)


@pytest.mark.parametrize("targets", [["qkv_proj"], "all-linear"])
def test_plain_adapter_settings_may_be_spelt_out(targets: object, tmp_path: Path) -> None:
    plain = {
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "fan_in_fan_out": False,
    }
    root = with_adapter(tmp_path / "c")
    put(
        root / "vision-lora" / "adapter_config.json",
        ADAPTER | plain | {"target_modules": targets, "lora_alpha": 0.5},
    )
    with Checkpoint.open(root) as checkpoint:
        assert checkpoint.adapters["vision"].config["lora_alpha"] == 0.5


LIST = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("jinja", "configured", "want"),
    [
        (None, None, None),
        (None, "text", "text"),
        (None, LIST, "D"),
        (None, LIST[:1], None),
        ("own ä", "text", "own ä"),
    ],
    ids=["none", "text", "list", "list without default", "file"],
)
def test_chat_template(jinja: str | None, configured: object, want: str | None, tmp_path: Path) -> None:
    root = single(tmp_path / "c")
    put(root / "tokenizer_config.json", {"chat_template": configured})
    if jinja is not None:
        put(root / "chat_template.jinja", jinja.encode())
    with Checkpoint.open(root) as checkpoint:
        assert checkpoint.chat_template == want


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "LICENSE.md"])
def test_licence(name: str, tmp_path: Path) -> None:
    root = single(tmp_path / "c")
    put(root / name, b"MIT \xc2\xa9")
    with Checkpoint.open(root) as checkpoint:
        assert checkpoint.licence_text == "MIT ©"


def fingerprint(root: Path) -> str:
    with Checkpoint.open(root) as checkpoint:
        return checkpoint.fingerprint


def test_fingerprint(tmp_path: Path) -> None:
    root = with_adapter(tmp_path / "one")
    first = fingerprint(root)
    assert len(first) == 64
    shutil.copytree(root, tmp_path / "two")
    assert fingerprint(tmp_path / "two") == first  # neither place nor time
    for name in ("config.json", "tokenizer.json", "vision-lora/adapter_config.json"):
        was = (root / name).read_bytes()
        put(root / name, was + b" ")
        assert fingerprint(root) != first, name
        put(root / name, was)
    put(root / "generation_config.json", {})
    assert fingerprint(root) != first
    (root / "generation_config.json").unlink()
    assert fingerprint(root) == first
    weights(root / "model.safetensors", "a", "c")
    assert fingerprint(root) != first


# -- numbers -------------------------------------------------------------------------------------


def bits(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    return array.view(np.uint32)


EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]:
    """An array on its way through the safetensors package and back through ours."""

    def through(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        root = single(tmp_path / "c")
        save_file({"t": array}, root / "model.safetensors")
        with Checkpoint.open(root) as checkpoint:
            back = checkpoint.read(checkpoint.tensors["t"])
        assert back.dtype == np.float32 and back.shape == array.shape
        assert back.flags.c_contiguous and back.flags.writeable
        return back

    return through


def test_every_bf16_keeps_its_bits(read: Callable[..., npt.NDArray[np.float32]]) -> None:
    back = read(EVERY_16_BITS.view(ml_dtypes.bfloat16))
    # The definition: the upper half of a float32. NaN payloads, infinities and subnormals included.
    want = b"".join(b"\0\0" + struct.pack("<H", n) for n in range(1 << 16))
    assert back.astype("<f4").tobytes() == want


def test_every_f16_is_exact(read: Callable[..., npt.NDArray[np.float32]]) -> None:
    back = read(EVERY_16_BITS.view(np.float16)).reshape(-1)
    want = np.array([struct.unpack("<e", struct.pack("<H", n))[0] for n in range(1 << 16)])  # as float64
    number = ~np.isnan(want)
    assert (back[number] == want[number]).all()
    assert (np.signbit(back[number]) == np.signbit(want[number])).all()
    assert np.isnan(back[~number]).all()
    assert (~number).sum() == 2 * 1023  # 2 signs, 10 bits of payload, not all zero


def test_f32_keeps_its_bits(read: Callable[..., npt.NDArray[np.float32]]) -> None:
    want = np.random.default_rng(1).integers(0, 1 << 32, (257, 300), dtype=np.uint32)  # 1 in 256 not finite
    assert not np.isfinite(want.view(np.float32)).all()
    assert (bits(read(want.view(np.float32))) == want).all()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 1, 3, 4)])
def test_shapes(shape: tuple[int, ...], read: Callable[..., npt.NDArray[np.float32]]) -> None:
    want = np.arange(math.prod(shape), dtype=np.float16).reshape(shape)
    assert (read(want) == want).all()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=["bf16", "f16", "f32"])
def test_rows(dtype: Any, tmp_path: Path) -> None:
    # 300,000 numbers: more than one piece of the reader, and 131,072 is no multiple of the row.
    whole = np.random.default_rng(2).normal(size=(600, 500)).astype(dtype)
    root = single(tmp_path / "c")
    save_file({"pad": whole[:1], "t": whole}, root / "model.safetensors")
    want = whole.astype(np.float32)
    with Checkpoint.open(root) as checkpoint:
        info = checkpoint.tensors["t"]
        for start, stop in [(0, 600), (0, 1), (599, 600), (100, 500), (263, 264), (7, 7), (600, 600)]:
            back = checkpoint.rows(info, start, stop)
            assert back.shape == (stop - start, 500)
            assert (back == want[start:stop]).all()
        checkpoint.rows(info, 0, 1)[:] = 0  # a fresh array: the next reader does not see this
        assert (checkpoint.rows(info, 0, 1) == want[:1]).all()


def test_threads(tmp_path: Path) -> None:
    whole = np.arange(256 * 2048, dtype=np.float32).reshape(256, 2048)  # row r starts with 2048 r
    root = single(tmp_path / "c")
    save_file({"t": whole}, root / "model.safetensors")
    wrong: list[int] = []
    with Checkpoint.open(root) as checkpoint:

        def work(first: int) -> None:
            for row in [(first + 37 * step) % 256 for step in range(100)]:
                if not (checkpoint.rows(checkpoint.tensors["t"], row, row + 1) == whole[row]).all():
                    wrong.append(row)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    root = single(tmp_path / "c")
    with Checkpoint.open(root) as checkpoint:
        path = root / "model.safetensors"
        size = path.stat().st_size
        os.truncate(path, size - 1)
        assert (checkpoint.read(checkpoint.tensors["a"]) == 1).all()
        with pytest.raises(CheckpointError) as error:
            checkpoint.read(checkpoint.tensors["b"])
    assert str(error.value).startswith(f"{path}: ends at byte {size - 1}, expected {size} bytes")


def test_close_twice(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "c"))
    checkpoint.close()
    checkpoint.close()
