# SPDX-License-Identifier: Apache-2.0
"""`bench` on a GGUF: what it counts, prints and refuses, and that it leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pocketphi.runtime import bench_gguf
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.bench_decoder import SpeedPlan, check_room, open_runner
from pocketphi.runtime.bench_gguf import Speed, SpeedResult, count_work
from pocketphi.runtime.bundle import Bundle
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.gguf_header import read_header, text_spec
from pocketphi.runtime.machine import Machine
from pocketphi.runtime.parts import TokenSpan

from .conftest import Converted
from .test_cli import CALL, call, failed

KEYS = ["kernels", "prefill_tps", "decode_tps", "gops", "gbps", "machine", "peer", "ratio"]
MACHINE = ["int8_gops", "fp32_gflops", "read_gbps", "threads", "cpu_features"]
SMALL = ["-p", "20", "-n", "3", "-r", "2", "-t", "2"]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    clean = {k: v for k, v in os.environ.items() if k != "POCKETPHI_MODEL"}
    return clean | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}


@pytest.fixture(scope="module")
def bundle(converted: Converted) -> Bundle:
    return bundles.load(converted("phi4-nano", "Q4_K_M", "Q8_0"))


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Path:
    return bundle.path(bundle.decoder)


@pytest.fixture(scope="module")
def lora(bundle: Bundle) -> Path:
    return bundle.path(bundle.adapters["vision"].file)


def plan_of(model: Path, **changes: object) -> SpeedPlan:
    plan = SpeedPlan(str(model), None, 20, 3, 0, 0, 2, 0, "f16")
    return replace(plan, **changes)  # type: ignore[arg-type]


# ---- what is counted ----


@pytest.mark.parametrize(("member", "recipe"), [("phi4-nano", "F16"), ("phi4-14b", "Q8_0")])
def test_work_is_that_of_the_configuration(member: str, recipe: str, converted: Converted) -> None:
    """Once from the file's tensors, once from the published shape; tied and untied head."""
    import gguf

    bundle = bundles.load(converted(member, recipe))
    path, t = bundle.path(bundle.decoder), bundle.text
    work = count_work(read_header(path), None, t, "q8_0")
    attention, mlp = t.d_model * (t.d_q + 2 * t.d_kv) + t.d_q * t.d_model, 3 * t.d_model * t.d_ff
    assert work.macs == t.n_layers * attention + (t.n_layers - 1) * mlp
    assert work.last_macs == mlp + t.vocab_size * t.d_model
    assert t.tied_head == (member == "phi4-nano")
    tensors = {x.name: int(x.n_bytes) for x in gguf.GGUFReader(path).tensors}
    unread = {"rope_factors_long.weight", "rope_factors_short.weight"}
    if not t.tied_head:
        unread.add("token_embd.weight")
    assert work.weight_bytes == sum(n for name, n in tensors.items() if name not in unread)
    assert work.kv_bytes_per_token == 2 * t.n_layers * t.d_kv * 34 / 32


def test_an_adapter_adds_its_two_matrices(model: Path, lora: Path, bundle: Bundle) -> None:
    header, t, rank = read_header(model), bundle.text, bundle.adapters["vision"].rank
    plain = count_work(header, None, t, "f16")
    adapted = count_work(header, read_header(lora), t, "f16")
    d_qkv = t.d_q + 2 * t.d_kv
    attention = (t.d_model + d_qkv) + (t.d_q + t.d_model)
    mlp = (t.d_model + 2 * t.d_ff) + (t.d_ff + t.d_model)
    every, last = adapted.macs - plain.macs, adapted.last_macs - plain.last_macs
    wanted = rank * (t.n_layers * attention + (t.n_layers - 1) * mlp)
    assert wanted <= every <= wanted + (t.n_layers - 1) * rank * t.d_model  # up and gate may be two of one A
    assert rank * mlp <= last <= rank * (mlp + t.d_model)
    assert adapted.weight_bytes - plain.weight_bytes == (every + last) * 34 / 32


def test_rates_follow_from_work() -> None:
    work = bench_gguf.Work(macs=100, last_macs=60, weight_bytes=1000, kv_bytes_per_token=2.0)
    assert work.prefill_operations(1) == 320
    assert work.prefill_operations(6) == 220
    reads = [1000 + 2.0 * (7 + i) for i in (1, 2, 3)]
    assert work.decode_bytes(7, 3) == pytest.approx(sum(reads) / 3)


@pytest.mark.parametrize("depth", [0, 5, 20, 33])
def test_a_sample_reads_and_writes_what_the_plan_says(depth: int, model: Path) -> None:
    plan = plan_of(model, depth=depth)
    header = read_header(model)
    with open_runner(plan, header, None) as runner:
        decoder = runner._decoder
        for _ in range(2):
            sample = runner.sample()
            assert min(sample.prefill_s, sample.decode_s) > 0
            assert decoder.length == depth + plan.n_predict
        found = decoder.feed(TokenSpan(np.array([7], np.int32)))
        decoder.rewind(0)  # the same sequence in one piece
        ids = np.concatenate([runner._prompt[:depth], runner._written, [7]]).astype(np.int32)
        wanted = decoder.feed(TokenSpan(ids))
    # Whatever was left in the cache from before would turn the logits round, rounding does not.
    assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.99


def test_room(model: Path) -> None:
    spec = text_spec(read_header(model))
    check_room(plan_of(model, n_prompt=spec.context_length), spec)
    check_room(plan_of(model, depth=spec.context_length - 3), spec)
    check_room(plan_of(model, n_ctx=20), spec)
    for changes, want in (
        ({"n_prompt": spec.context_length + 1}, "do not fit a context of 8192"),
        ({"depth": spec.context_length - 2}, "do not fit a context of 8192"),
        ({"n_ctx": 19}, "do not fit a context of 19"),
        ({"n_ctx": spec.context_length + 1}, "takes 1 to 8192"),
    ):
        with pytest.raises(InputError, match=want):
            check_room(plan_of(model, **changes), spec)  # type: ignore[arg-type]


# ---- what is printed ----


@pytest.mark.parametrize("extra", [[], ["--depth", "30", "-c", "300", "--cache-type", "q8_0"]])
def test_json(extra: list[str], model: Path, env: dict[str, str]) -> None:
    code, out, err = call(env, "bench", "-m", model, *SMALL, "--json", *extra)
    assert code == 0, err
    found = json.loads(out)
    assert list(found) == KEYS
    assert list(found["machine"]) == MACHINE
    assert (found["peer"], found["ratio"]) == (None, None)
    assert found["kernels"] in ("stock", "avx2", "avxvnni", "avx512vnni", "neon_dotprod", "neon_i8mm")
    assert min(found[k] for k in KEYS[1:5]) > 0
    assert found["machine"]["threads"] == 2
    assert "repetition 2 of 2" in err


def test_json_beside_stock_and_through_an_adapter(model: Path, lora: Path, env: dict[str, str]) -> None:
    args = ["bench", "-m", model, "--lora", lora, *SMALL, "--compare", "stock", "--json"]
    code, out, err = call(env, *args)
    assert code == 0, err
    found = json.loads(out)
    assert list(found) == KEYS
    for name in ("prefill", "decode"):
        assert found["ratio"][name] == pytest.approx(found[f"{name}_tps"] / found["peer"][f"{name}_tps"])
    spec = bundles.load(model.parent).text
    work = count_work(read_header(model), read_header(lora), spec, "f16")
    assert found["gops"] == pytest.approx(work.prefill_operations(20) * found["prefill_tps"] / 1e9)
    assert found["gbps"] == pytest.approx(work.decode_bytes(0, 3) * found["decode_tps"] / 1e9)


def test_a_model_directory_is_measured_through_its_backbone(model: Path, env: dict[str, str]) -> None:
    code, out, _ = call(env, "bench", "-m", model.parent, *SMALL, "--json")
    assert (code, list(json.loads(out))) == (0, KEYS)


def test_the_table() -> None:
    machine = Machine(1000.0, 250.0, 40.0, 2, ("avx2", "fma"))
    result = SpeedResult(
        plan_of(Path("/x/m.gguf"), lora="/x/v.gguf", depth=9), "c", 3 << 20, Speed(200.0, 10.0), 500.0, 30.0,
        machine, Speed(50.0, 5.0),
    )  # fmt: skip
    *lines, _, limits = bench_gguf.table(result)
    assert [line.split("|")[1:-1] for line in lines[:1] + lines[2:]] == [
        [" model ", "    size ", " kernels ", " threads ", "     test ", " tokens/s ", " stock ", " ratio ",
         "       rate ", " of machine "],
        [" m + v ", " 3.0 MiB ", "       c ", "       2 ", "     pp20 ", "   200.00 ", " 50.00 ", "  4.00 ",
         " 500.0 GOPS ", "       50 % "],
        [" m + v ", " 3.0 MiB ", "       c ", "       2 ", " tg3 @ d9 ", "    10.00 ", "  5.00 ", "  2.00 ",
         " 30.00 GB/s ", "       75 % "],
    ]  # fmt: skip
    assert set(lines[1]) == set("|-:")
    assert [at for at, c in enumerate(lines[1]) if c == "|"] == [
        at for at, c in enumerate(lines[0]) if c == "|"
    ]
    assert limits == "machine: int8 1000 GOPS, fp32 250 GFLOPS, read 40.0 GB/s on 2 threads; avx2 fma"


# ---- what is refused ----


def refused(env: dict[str, str], *args: str | Path) -> tuple[int, str]:
    """Exit code and the last line; progress may stand before it."""
    code, out, err = call(env, "bench", *args)
    assert out == ""
    assert "Traceback" not in err
    return code, err.splitlines()[-1]


def test_errors_are_one_line(model: Path, lora: Path, env: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("hello " * 100, "utf-8")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(model.read_bytes()[:-4096])
    for args, code, want in (
        (["-m", text], 3, "is not a GGUF file"),
        (["-m", damaged], 3, "ends beyond the end of the file"),
        (["-m", tmp_path / "gone.gguf"], 3, "gone.gguf"),
        (["-m", tmp_path, "-p", "5"], 3, "bundle.json"),
        (["-m", lora], 3, "is an adapter"),
        (["-m", model, "--lora", model], 3, "is not an adapter"),
        (["-m", model, "--lora", tmp_path / "gone"], 3, "gone"),
        (["-m", model, "-c", "9999999"], 2, "takes 1 to 8192"),
        (["-m", model, "-p", "9999999"], 2, "do not fit"),
        (["-m", model, "--cache-type", "q9"], 2, "KV type"),
        (["-m", model, "-t", "0"], 2, "threads is 0"),
        (["-m", model, "-t", "513"], 2, "threads is 513"),
        (["-m", model, "--compare", "other"], 2, "--compare"),
        (["-m", model, "--only", "text"], 2, "--only"),
        (["-m", model, "-p", "0"], 2, "-p"),
    ):
        found = refused(env, *args)  # type: ignore[arg-type]
        assert found[0] == code, (args, found)
        assert found[1].startswith("error: ")
        assert want in found[1]


def test_an_adapter_of_another_model(converted: Converted, model: Path, env: dict[str, str]) -> None:
    other = bundles.load(converted("phi4-multimodal", "F32"))
    code, line = refused(env, "-m", model, *SMALL, "--lora", other.path(other.adapters["speech"].file))
    assert (code, "is an adapter of another checkpoint" in line) == (3, True)


def test_an_unknown_choice_of_kernels(model: Path, env: dict[str, str]) -> None:
    wrong = env | {"POCKETPHI_KERNELS": "fast"}
    assert failed(wrong, "info", model.parent)[0] == 2
    assert failed(wrong, "run", "-m", model.parent, "-p", "x")[0] == 2
    assert refused(wrong, "-m", model)[0] == 2


def test_info_and_run_say_which_kernels(model: Path, env: dict[str, str]) -> None:
    stock = env | {"POCKETPHI_KERNELS": "stock"}
    code, out, err = call(stock, "info", model.parent)
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("kernels"))
    assert lines == {"kernels": "stock ggml: POCKETPHI_KERNELS is 'stock'"}
    found = json.loads(call(stock, "info", model.parent, "--json")[1])["kernels"]
    assert (found["active"], found["reason"]) == (False, "POCKETPHI_KERNELS is 'stock'")
    found = json.loads(call(stock, "run", "-m", model.parent, "-p", "Hi", "-n", "2", "--json")[1])["kernels"]
    assert (found["active"], found["counts"]) == (False, {})
    err = call(stock, "chat", "-m", model.parent, stdin=b"/stats\n")[2]
    assert "kernels: stock ggml" in err


# ---- what is left behind ----


def children(parent: int) -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text("utf-8").rpartition(")")[2].split()
            except OSError:
                continue  # gone meanwhile
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def is_running(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_the_peer_never_outlives_its_parent(
    sent: signal.Signals, code: int, model: Path, env: dict[str, str]
) -> None:
    args = ["bench", "-m", str(model), "-p", "20", "-n", "2", "-r", "100", "--compare", "stock"]
    with subprocess.Popen([*CALL, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"repetition 2 of"):  # both have loaded and take turns
                break
        peers = children(process.pid)
        assert len(peers) == 1
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (out, b"Traceback" in err) == (b"", False)
    for _ in range(600):  # killed, it needs a moment to notice the end of its pipe
        if not is_running(peers[0]):
            break
        time.sleep(0.1)
    assert not is_running(peers[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_peer_that_dies_is_one_line(model: Path, env: dict[str, str]) -> None:
    args = ["bench", "-m", str(model), "-p", "20", "-n", "2", "-r", "100", "--compare", "stock"]
    with subprocess.Popen([*CALL, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"repetition 2 of"):
                break
        for peer in children(process.pid):
            os.kill(peer, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (4, b"")
    assert err.splitlines()[-1] == b"error: the peer process ended with status -9"
