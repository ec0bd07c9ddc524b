# SPDX-License-Identifier: Apache-2.0
"""Every graph of ours passes before ONNX Runtime sees it; one with anything else in it does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.errors import BundleError
from pocketphi.runtime.onnx_check import MAX_GRAPH_BYTES, _Graph, check_graph

from ..bite.spoilt_onnx import SPOILT
from ..conftest import Converted

ENDS = {
    "tower": ({"patches": 3, "position_ids": 1, "keys": 1, "grid": 1}, "features"),
    "projector": ({"features": 2, "rows": 1}, "embeddings"),
    "front": ({"features": 3}, "tokens"),
    "trunk": ({"tokens": 2}, "hidden"),
    "speech-projector": ({"hidden": 2}, "rows"),
    "vision-projector": ({"hidden": 2}, "rows"),
}


@pytest.fixture
def graph(converted: Converted, tmp_path: Path) -> Path:
    """A copy of the speech encoder's trunk, its weights a hard link."""
    source = converted("phi4-nano", "Q8_0")
    os.link(source / "speech.onnx.data", tmp_path / "speech.onnx.data")
    (tmp_path / "speech.onnx").write_bytes((source / "speech.onnx").read_bytes())
    return tmp_path / "speech.onnx"


@pytest.mark.parametrize("quant", ["int8", "int4", "fp16", "fp32"])
def test_what_the_converter_writes_passes(quant: str, converted: Converted) -> None:
    bundle = bundles.load(converted("phi4-nano", "Q8_0", encoders=quant))
    found = {name: file for e in bundle.encoders.values() for name, file in e.graphs.items()}
    assert found.keys() == ENDS.keys()
    for name, file in found.items():
        assert check_graph(bundle.path(file), *ENDS[name]) == bundle.path(file).read_bytes()


def refused(path: Path, want: str) -> None:
    with pytest.raises(BundleError, match=want) as caught:
        check_graph(path, *ENDS["trunk"])
    assert str(path.parent) in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt(what: str, graph: Path) -> None:
    edit, want = SPOILT[what]
    model = onnx.load(graph, load_external_data=False)
    edit(model)
    graph.write_bytes(model.SerializeToString(deterministic=True))
    refused(graph, want)


def test_every_cut_and_every_other_byte(converted: Converted) -> None:
    """Of a small graph: no part of it passes, and with another byte it passes or not, and that is all."""
    path = converted("phi4-nano", "Q8_0") / "speech-projector.onnx"
    raw, data = path.read_bytes(), path.with_name(f"{path.name}.data").stat().st_size
    assert len(raw) < 3000

    def passes(changed: bytes) -> bool:
        try:
            graph = _Graph(path, changed, f"{path.name}.data", data)
            graph.check_ranks(graph.check(), *ENDS["speech-projector"])
        except BundleError as exc:
            assert str(exc).isprintable()
            return False
        return True

    assert passes(raw)
    assert not any(passes(raw[:n]) for n in range(len(raw)))
    changes = [raw[:i] + bytes([b]) + raw[i + 1 :] for i in range(len(raw)) for b in (0, 255, raw[i] ^ 0x80)]
    assert 0 < sum(map(passes, changes)) < len(changes)


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        (b"", "is not an ONNX graph"),
        (b"\xff" * 12, "a number, or holds one that does not end"),
        (b"\x08", "ends within a number"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "ends within a model"),
        (b"\x3a\x00\x08\x0a\x3a\x00", "holds no graph, or more than one"),
        (b"\x0b\x0c", r"holds field 1 \(model\)"),  # groups, which protobuf gave up
    ],
    ids=["empty", "endless number", "no number", "a length of 2^64-1", "two graphs", "a group"],
)
def test_no_protobuf(raw: bytes, want: str, tmp_path: Path) -> None:
    path = tmp_path / "speech.onnx"
    path.write_bytes(raw)
    refused(path, want)


def test_too_much_of_it(tmp_path: Path) -> None:
    path = tmp_path / "speech.onnx"
    path.write_bytes(b"\x08\x0a" * 600_000)
    refused(path, "or too many")
    os.truncate(path, MAX_GRAPH_BYTES + 1)
    refused(path, "expected at most")


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [pipe, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_not_a_file(make: Callable[[Path], None], graph: Path) -> None:
    data = graph.with_name("speech.onnx.data")
    data.unlink()
    make(data)
    refused(graph, "speech.onnx.data: is not a regular file of this directory")
    graph.unlink()
    make(graph)
    refused(graph, "speech.onnx: is not a regular file")


def test_where_the_data_is(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = graph.with_name("speech.onnx.data")
    check_graph(graph, *ENDS["trunk"])  # a hard link: a file like any other
    data.rename(graph.with_name("weights"))
    refused(graph, "of the 0 that")
    data.symlink_to("weights")
    check_graph(graph, *ENDS["trunk"])
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "weights"
    graph.with_name("weights").rename(elsewhere)
    data.unlink()
    data.symlink_to(elsewhere)
    refused(graph, "is not a regular file of this directory")


def test_a_name_that_is_no_text(graph: Path) -> None:
    """protobuf itself would refuse it; so it is changed where it stands."""
    raw = graph.read_bytes()
    name = onnx.load(graph, load_external_data=False).graph.node[0].output[0].encode()
    graph.write_bytes(raw.replace(name, name[:-1] + b"\xff"))
    refused(graph, "holds a name that is not UTF-8")


def test_an_unknown_type_of_end(graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("tokens", onnx.TensorProto.STRING, [1, 2]))
    graph.write_bytes(model.SerializeToString())
    refused(graph, "of the unknown type 8")


def test_as_many_operators_as_ours_and_no_more(graph: Path) -> None:
    """ONNX Runtime takes 11 s for 30,000 of the smallest."""
    model = onnx.load(graph, load_external_data=False)
    model.graph.node.extend(helper.make_node("Abs", ["hidden"], [f"x{i}"]) for i in range(12_000))
    graph.write_bytes(model.SerializeToString(deterministic=True))
    refused(graph, "operators, expected at most 12000")
