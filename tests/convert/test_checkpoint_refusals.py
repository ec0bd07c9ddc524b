# SPDX-License-Identifier: Apache-2.0
"""Checkpoint directories of every wrong kind: each is one line that names the file and what was wanted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.runtime.errors import CheckpointError

from .handmade import ADAPTER, INDEX, put, sharded, single, weights, with_adapter


def open_descriptors() -> int:
    """How many this process has; 0 where the system does not say."""
    listing = Path("/proc/self/fd")
    return sum(1 for _ in listing.iterdir()) if listing.is_dir() else 0


def refused(root: Path) -> str:
    before = open_descriptors()
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(root)
    text = str(error.value)
    assert error.value.exit_code == 5
    assert len(text.splitlines()) == 1 and text.isprintable() and len(text) < 1000
    assert text.startswith(str(root))
    assert open_descriptors() == before, "a failed open leaves descriptors behind"
    return text.removeprefix(str(root))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.gguf", "is a GGUF file, expected a Hugging Face checkpoint directory"),
        ("model.safetensors", "is one safetensors file, expected"),
        ("pytorch_model.bin", "is a pickle, which is never loaded, expected"),
        ("model.PTH", "is a pickle, which is never loaded, expected"),
        ("notes.txt", "is not a directory, expected"),
    ],
)
def test_a_source_that_is_a_file(name: str, said: str, tmp_path: Path) -> None:
    put(tmp_path / name, b"GGUF")
    assert said in refused(tmp_path / name)


def test_sources_that_cannot_be_opened(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "No such file or directory" in refused(tmp_path / "absent")
    assert "expected a Hugging Face checkpoint directory" in refused(loop)
    assert "expected a Hugging Face checkpoint directory" in refused(tmp_path / ("n" * 300))
    with pytest.raises(CheckpointError, match=r"nul\\x00byte: "):
        Checkpoint.open(Path("nul\0byte"))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "is not a directory" in refused(fifo)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "has no weights, expected model.safetensors or model.safetensors.index.json"),
        (
            ["pytorch_model.bin", "x.index.json"],
            "has weights only as pickles, which are never loaded, expected model",
        ),
        (["consolidated.00.pth"], "has weights only as pickles, which are never loaded, expected model"),
        (["model.gguf"], "has weights only as GGUF, expected model.safetensors"),
        (
            ["model-00001-of-00002.safetensors"],
            "has *.safetensors without an index, expected model.safetensors",
        ),
        (["bundle.json", "backbone.gguf"], "it is a model directory, converted already"),
    ],
    ids=["nothing", "bin", "pth", "gguf", "shards alone", "bundle"],
)
def test_directories_without_weights(files: list[str], said: str, tmp_path: Path) -> None:
    root = single(tmp_path / "c")
    (root / "model.safetensors").unlink()
    for name in files:
        put(root / name, b"")
    assert said in refused(root)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_required_files(name: str, tmp_path: Path) -> None:
    root = single(tmp_path / "c")
    (root / name).unlink()
    assert refused(root) == f": has no {name}, expected a Hugging Face checkpoint"
    (root / name).symlink_to("nowhere")
    assert refused(root).startswith(f"/{name}: cannot be opened: ")
    (root / name).unlink()
    (root / name).mkdir()
    assert refused(root) == f"/{name}: is a directory, expected a regular file"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json", INDEX]
)
@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is not valid JSON"),
        (b"[]", "is a JSON array, expected an object"),
        (b'{"a": "\xe9"}', "is not UTF-8 at byte 7"),
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b'{"a":' * 50_000, "is JSON nested too deeply"),
    ],
    ids=["empty", "array", "latin-1", "key twice", "depth bomb"],
)
def test_json_files(name: str, raw: bytes, said: str, tmp_path: Path) -> None:
    root = single(tmp_path / "c")
    put(root / name, raw)
    text = refused(root)
    assert text.startswith(f"/{name}: ") and said in text


@pytest.mark.parametrize(
    ("name", "cap"),
    [
        ("config.json", 4 << 20),
        ("chat_template.jinja", 4 << 20),
        ("LICENSE", 4 << 20),
        ("tokenizer.json", 64 << 20),
        (INDEX, 64 << 20),
    ],
)
def test_caps(name: str, cap: int, tmp_path: Path) -> None:
    root = single(tmp_path / "c")
    with (root / name).open("wb") as file:
        file.truncate(cap + 1)
    assert refused(root) == f"/{name}: has {cap + 1} bytes, expected at most {cap}"


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE"])
def test_text_files_are_utf8(name: str, tmp_path: Path) -> None:
    root = single(tmp_path / "c")
    put(root / name, b"\xa9 2024")
    assert refused(root) == f"/{name}: is not UTF-8 at byte 0"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1, "chat_template is 1, expected text"),
        (["x"], "chat_template is ['x'], expected objects with name and template"),
        ([{"name": "default"}], "chat_template is a list of 1, expected objects with name and template"),
        ([{"name": "default", "template": 1}], "chat_template is 1, expected text"),
    ],
    ids=["number", "strings", "no template", "template is a number"],
)
def test_chat_templates_of_a_wrong_type(value: object, said: str, tmp_path: Path) -> None:
    root = single(tmp_path / "c")
    put(root / "tokenizer_config.json", {"chat_template": value})
    assert refused(root) == f"/tokenizer_config.json: {said}"


SHARD_NAMES: list[object] = [
    "../one.safetensors",
    "sub/one.safetensors",
    "/etc/one.safetensors",
    "..\\one.safetensors",
    "C:\\one.safetensors",
    "C:one.safetensors",
    "one.safetensors\0",
    "a\nb.safetensors",
    "..",
    ".",
    "",
    "one.bin",
    "one.safetensors.py",
    None,
    1,
    ["one.safetensors"],
    {},
]


@pytest.mark.parametrize("shard", SHARD_NAMES, ids=range(len(SHARD_NAMES)))
def test_shard_names_that_are_not_plain(shard: object, tmp_path: Path) -> None:
    root = sharded(tmp_path / "c")
    weights(tmp_path / "one.safetensors", "a", "b")  # what "../" would find
    put(root / INDEX, {"weight_map": {"a": shard, "b": "one.safetensors", "c": "two.safetensors"}})
    text = refused(root)
    assert text.startswith(f"/{INDEX}: tensor 'a' is in ")
    assert text.endswith(", expected the plain name of a .safetensors file")


@pytest.mark.parametrize("value", [None, [], {}, "x", 1], ids=["absent", "list", "empty", "text", "number"])
def test_a_weight_map_of_a_wrong_type(value: object, tmp_path: Path) -> None:
    root = sharded(tmp_path / "c")
    put(root / INDEX, {"metadata": {}} if value is None else {"weight_map": value})
    assert refused(root).startswith(f"/{INDEX}: weight_map is ")


def test_a_tensor_twice_in_the_index(tmp_path: Path) -> None:
    root = sharded(tmp_path / "c")
    put(root / INDEX, b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    assert "key 'a' stands twice" in refused(root)


ONE, TWO = "one.safetensors", "two.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": ONE, "b": ONE, "c": "three.safetensors"}, "names 'three.safetensors', which is missing"),
        ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, "tensor 'd' is not in 'two.safetensors'"),
        ({"a": ONE, "b": ONE, "c": ONE}, "tensor 'c' is not in 'one.safetensors'"),
        ({"a": TWO, "b": ONE, "c": TWO}, "tensor 'a' is not in 'two.safetensors' but in 'one.safetensors'"),
        ({"a": ONE, "c": TWO}, "does not name tensor 'b' of 'one.safetensors'"),
    ],
    ids=[
        "missing shard",
        "missing tensor",
        "missing tensor, shard unnamed",
        "other shard",
        "tensor not named",
    ],
)
def test_an_index_that_lies(weight_map: dict[str, str], said: str, tmp_path: Path) -> None:
    root = sharded(tmp_path / "c")
    put(root / INDEX, {"weight_map": weight_map})
    assert refused(root) == f"/{INDEX}: {said}"


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    root = sharded(tmp_path / "c")
    weights(root / TWO, "c", "b")
    assert refused(root) == f"/{INDEX}: tensor 'b' is in both 'one.safetensors' and 'two.safetensors'"


def test_index_and_a_single_file_it_does_not_name(tmp_path: Path) -> None:
    root = sharded(tmp_path / "c")
    weights(root / "model.safetensors", "a", "b", "c")
    assert refused(root).startswith(f"/{INDEX}: does not name model.safetensors, which stands beside it")


def test_shards_that_are_damaged(tmp_path: Path) -> None:
    root = sharded(tmp_path / "c")
    path = root / TWO
    os.truncate(path, path.stat().st_size - 1)
    assert refused(root).startswith(f"/{TWO}: tensor 'c' ends at byte ")
    os.truncate(path, 5)
    assert refused(root) == f"/{TWO}: has 5 bytes, expected a safetensors file"
    path.unlink()
    path.mkdir()
    assert refused(root) == f"/{TWO}: is a directory, expected a regular file"
    path.rmdir()
    os.mkfifo(path)
    assert refused(root) == f"/{TWO}: is a pipe, expected a regular file"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected LORA"),
        ({"peft_type": None}, "peft_type is None, expected LORA"),
        ({"r": 0}, "r is 0, expected a rank from 1"),
        ({"r": -1}, "r is -1, expected"),
        ({"r": True}, "r is True, expected"),
        ({"r": "256"}, "r is '256', expected"),
        ({"r": 1 << 40}, "r is 1099511627776, expected"),
        ({"lora_alpha": 0}, "lora_alpha is 0, expected a number above 0"),
        ({"lora_alpha": None}, "lora_alpha is None, expected"),
        ({"lora_alpha": True}, "lora_alpha is True, expected"),
        ({"lora_alpha": 10**60}, "lora_alpha is 1000000"),
        ({"target_modules": None}, "target_modules is None, expected a pattern or a list of names"),
        ({"target_modules": []}, "target_modules is [], expected"),
        ({"target_modules": [1]}, "target_modules is [1], expected"),
        ({"use_dora": True}, "use_dora is True, expected false"),
        ({"use_rslora": True}, "use_rslora is True, expected false"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True, expected false"),
        ({"bias": "all"}, "bias is 'all', expected \"none\""),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], expected null"),
        ({"rank_pattern": {"q": 1}}, "rank_pattern is an object of 1 keys, expected {}"),
    ],
    ids=range(20),
)
def test_adapter_configurations(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    root = with_adapter(tmp_path / "c")
    put(root / "vision-lora" / "adapter_config.json", ADAPTER | changes)
    assert refused(root).startswith(f"/vision-lora/adapter_config.json: {said}")


def test_adapter_folders(tmp_path: Path) -> None:
    root = with_adapter(tmp_path / "c")
    folder = root / "vision-lora"
    (folder / "adapter_config.json").unlink()
    assert refused(root).startswith(": has no vision-lora/adapter_config.json")
    (folder / "adapter_model.safetensors").unlink()
    assert (
        refused(root) == "/vision-lora: has no adapter_model.safetensors, expected adapter_model.safetensors"
    )
    put(folder / "adapter_model.bin", b"")
    assert refused(root).startswith("/vision-lora: has only a pickle, which is never loaded, expected")
    put(root / "speech-lora", b"")
    shutil.rmtree(folder)
    assert refused(root).startswith("/speech-lora: is not a directory")
