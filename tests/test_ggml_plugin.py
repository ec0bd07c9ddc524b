# SPDX-License-Identifier: Apache-2.0
"""The plug-in's door: what is checked before ggml sees it, and that whatever is wrong leaves stock ggml.

ggml's registry belongs to a process, so each case has one of its own. The libraries are small ones compiled
here: real files that really are of another version, refuse, or register something else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp
import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime import ggml_plugin
from pocketphi.runtime.report import kernels_line

CC = shutil.which("cc")
SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

// struct ggml_backend_reg of ggml-backend-impl.h, for a backend without devices
typedef struct reg {
    int api_version;
    const char *(*get_name)(struct reg *);
    size_t (*get_device_count)(struct reg *);
    void *(*get_device)(struct reg *, size_t);
    void *(*get_proc_address)(struct reg *, const char *);
    void *context;
} reg;

static uint64_t started;
static const char *get_name(reg *r) { (void)r; return NAME; }
static size_t count(reg *r) { (void)r; return 0; }
static void *device(reg *r, size_t i) { (void)r; (void)i; return NULL; }
static void *address(reg *r, const char *name) { (void)r; (void)name; return NULL; }
static reg backend = {REG_API, get_name, count, device, address, NULL};

reg *ggml_backend_init(void) { started++; fputs("(init)", stdout); return REFUSE ? NULL : &backend; }
const char *pk_ggml_version(void) { return VERSION; }
int pk_ggml_api(void) { return API; }
const char *pk_ggml_variant(void) { return "c"; }
const char *pk_ggml_refusal(void) { return REFUSE ? REASON : NULL; }
#ifndef WITHOUT_COUNTS
void pk_ggml_counts(uint64_t counts[8]) {
    for (int i = 0; i < 8; i++) counts[i] = 10u * (unsigned)i + started;
}
#endif
"""

LOAD = """
import ctypes, json, logging, os, sys
from dataclasses import asdict
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="LOG %(levelname)s %(name)s %(message)s")
import llama_cpp.llama_cpp
from pocketphi.runtime import ggml_plugin
from pocketphi.runtime.errors import PocketPhiError
lib = llama_cpp.llama_cpp._lib
path = Path(sys.argv[1])
before = lib.ggml_backend_reg_count()
if len(sys.argv) > 2:
    lib["ggml_backend_load"](os.fsencode(sys.argv[2]))
try:
    state = ggml_plugin.load(path)
    assert ggml_plugin.load(path) is state
except PocketPhiError as exc:
    print(json.dumps({"error": str(exc), "code": exc.exit_code}))
    raise SystemExit
counts = dict(ggml_plugin.counts(state))
added = lib.ggml_backend_reg_count() - before
print(json.dumps(asdict(state) | {"path": str(state.path), "counts": counts, "added": added}))
"""


@dataclass(frozen=True)
class Outcome:
    """What a process found."""

    state: dict[str, Any]
    logged: list[str]
    started: int  # calls of ggml_backend_init


def load(path: Path, *before: Path, **env: str) -> Outcome:
    clean = {k: v for k, v in os.environ.items() if k not in ("POCKETPHI_KERNELS", "GGML_BACKEND_PATH")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), *map(str, before)],
        env=clean | env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logged = done.stderr.splitlines()
    assert all(line.startswith("LOG ") for line in logged), done.stderr
    out = done.stdout.replace("(init)", "")
    return Outcome(json.loads(out), logged, done.stdout.count("(init)"))


def ggml_version() -> str:
    function = llama_cpp.llama_cpp._lib["ggml_version"]
    function.restype = llama_cpp.llama_cpp.ctypes.c_char_p
    return str(function().decode())


@pytest.fixture
def library(tmp_path: Path) -> Any:
    """`library(API=3, …)`: a plug-in that differs from a good one in what is named."""
    if CC is None:
        pytest.skip("no C compiler")

    def build(file: str = "libpk_ggml.so", **changes: object) -> Path:
        values: dict[str, object] = {
            "NAME": '"PK"', "VERSION": f'"{ggml_version()}"', "API": 2, "REG_API": 2, "REFUSE": 0,
            "REASON": '"no"',
        }  # fmt: skip
        defines = [f"-D{k}={v}" for k, v in (values | changes).items()]
        source, out = tmp_path / "plugin.c", tmp_path / file
        source.write_text(SOURCE, "utf-8")
        subprocess.run([str(CC), "-shared", "-fPIC", *defines, str(source), "-o", str(out)], check=True)
        return out

    return build


def assert_stock(found: Outcome, reason: str, level: str = "WARNING") -> None:
    """Stock ggml, for this reason, said in one line; nothing was added to the registry."""
    assert not found.state["active"]
    assert reason in found.state["reason"]
    assert (found.state["variant"], found.state["counts"], found.state["added"]) == ("", {}, 0)
    assert found.logged == [f"LOG {level} {ggml_plugin.__name__} stock ggml: {found.state['reason']}"]


def test_a_good_one_is_registered_where_llama_cpp_looks(library: Any) -> None:
    path = library()
    found = load(path)
    assert found.state == {
        "active": True,
        "reason": "",
        "variant": "c",
        "ggml": ggml_version(),
        "path": str(path),
        "counts": {name: 10 * i + 1 for i, name in enumerate(ggml_plugin.COUNTS)},
        "added": 1,
    }
    assert (found.logged, found.started) == ([], 1)


def test_another_ggml_version_is_never_started(library: Any) -> None:
    found = load(library(VERSION='"0.99.1"'))
    assert_stock(found, f"libpk_ggml.so was built for ggml 0.99.1, this one is {ggml_version()}")
    assert found.started == 0


def test_another_api_is_never_started(library: Any) -> None:
    found = load(library(API=3))
    assert_stock(found, "libpk_ggml.so has the plug-in API 3, expected 2")
    assert found.started == 0


def test_a_plugin_that_refuses_says_why(library: Any) -> None:
    found = load(library(REFUSE=1, REASON='"the CPU lacks AVX2"'))
    assert_stock(found, "libpk_ggml.so is not usable here: the CPU lacks AVX2", "INFO")
    assert found.started == 1


def test_a_plugin_that_refuses_and_does_not_say_why(library: Any) -> None:
    assert_stock(load(library(REFUSE=1, REASON="NULL")), "ggml_backend_init returned NULL")


def test_ggml_rejects_the_struct_version(library: Any) -> None:
    assert_stock(load(library(REG_API=7)), "incompatible API version")


def test_a_backend_of_another_name(library: Any) -> None:
    assert_stock(load(library(NAME='"OTHER"')), "does not list a backend PK")


def test_a_library_without_a_function(library: Any) -> None:
    found = load(library(WITHOUT_COUNTS=1))
    assert_stock(found, "libpk_ggml.so does not export pk_ggml_counts")
    assert found.started == 0


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "libpk_ggml.so"
    path.write_bytes(b"not a library\n" * 100)
    assert_stock(load(path), "libpk_ggml.so cannot be loaded: ")


def test_no_library_is_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "libpk_ggml.so"
    assert_stock(load(path), "the package was built without libpk_ggml.so", "INFO")


def test_stock_on_request(library: Any) -> None:
    found = load(library(), POCKETPHI_KERNELS="stock")
    assert_stock(found, "POCKETPHI_KERNELS is 'stock'", "INFO")
    assert found.started == 0


@pytest.mark.parametrize("value", ["", "auto"])
def test_the_default_by_name(value: str, library: Any) -> None:
    assert load(library(), POCKETPHI_KERNELS=value).state["active"]


@pytest.mark.parametrize("value", ["Stock", "avx2", "x" * 500])
def test_any_other_value_is_an_error(value: str, library: Any) -> None:
    found = load(library(), POCKETPHI_KERNELS=value)
    assert found.state["code"] == 2
    assert found.state["error"] == f"POCKETPHI_KERNELS is {value[:40]!r}, expected one of auto, stock"
    assert (found.logged, found.started) == ([], 0)


def test_one_that_is_registered_already_is_used(library: Any) -> None:
    path = library()
    found = load(path, path)
    assert (found.state["active"], found.state["added"], found.started) == (True, 1, 1)
    assert found.state["counts"]["graphs"] == 1


def test_one_that_came_from_another_file_is_counted_there(library: Any, tmp_path: Path) -> None:
    theirs = library("theirs.so")
    for path in (tmp_path / "libpk_ggml.so", library()):  # our own file: missing, and there
        found = load(path, theirs, GGML_BACKEND_PATH=str(theirs))
        assert (found.state["active"], found.state["path"], found.started) == (True, str(theirs), 1)
        assert found.state["counts"]["graphs"] == 1
    found = load(tmp_path / "libpk_ggml.so", theirs)
    assert not found.state["active"] or found.state["path"] == str(tmp_path / "libpk_ggml.so")
    assert len(found.logged) == 1


def test_stock_cannot_be_had_once_one_is_registered(library: Any) -> None:
    path = library()
    found = load(path, path, POCKETPHI_KERNELS="stock")
    assert found.state == {
        "error": "POCKETPHI_KERNELS is 'stock', but this process has loaded the backend PK",
        "code": 2,
    }


@pytest.fixture
def ours() -> Path:
    """The plug-in of this package."""
    path = ggml_plugin.library_path()
    if not path.is_file():
        pytest.skip("the package was built without plug-in")
    return path


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ("none", "this CPU has none of the instruction sets that beat ggml's own"),
        ("avx2,avx3", "POCKETPHI_CPU_MASK names an unknown CPU feature"),
    ],
)
def test_ours_refuses_a_cpu_without_what_it_needs(ours: Path, mask: str, reason: str) -> None:
    found = load(ours, POCKETPHI_CPU_MASK=mask)
    assert_stock(found, f"libpk_ggml{ours.suffix} is not usable here: {reason}", "INFO")


INIT = """
import ctypes, sys
plugin = ctypes.CDLL(sys.argv[1])
plugin.ggml_backend_init.restype = ctypes.c_void_p
plugin.pk_ggml_refusal.restype = ctypes.c_char_p
assert plugin.pk_ggml_refusal() is None
for _ in range(2):
    assert plugin.ggml_backend_init() is None
    print(plugin.pk_ggml_refusal().decode())
"""


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ("", "the host's ggml library was not found"),
        ("none", "the host's ggml library was not found"),
        ("sse9", "POCKETPHI_CPU_MASK names an unknown CPU feature"),
    ],
)
def test_ours_without_ggml_refuses_by_itself(ours: Path, mask: str, reason: str) -> None:
    """Any program may load it: what it lacks is NULL and a reason, not a crash."""
    env = {k: v for k, v in os.environ.items() if k != "POCKETPHI_CPU_MASK"}
    done = subprocess.run(
        [sys.executable, "-c", INIT, str(ours)],
        env=env | ({"POCKETPHI_CPU_MASK": mask} if mask else {}),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [reason] * 2


def test_what_info_prints() -> None:
    state = ggml_plugin.PluginState(True, "", "avx2", "0.25.3", Path("/x/libpk_ggml.so"))
    assert kernels_line(state) == "avx2 (libpk_ggml for ggml 0.25.3)"
    counts = dict(zip(ggml_plugin.COUNTS, (3, 90, 21, 512, 4, 5 << 20, 2), strict=True))
    assert kernels_line(state, counts) == (
        "avx2 (libpk_ggml for ggml 0.25.3), 3 graphs, 21 matmuls of 512 tokens, 4 attentions, "
        "5.0 MiB of packed weights"
    )
    stock = ggml_plugin.PluginState(False, "why", "", "0.25.3", Path("/x/libpk_ggml.so"))
    assert kernels_line(stock) == "stock ggml: why"


DECODE = """
import json, sys
import numpy as np
from pathlib import Path
from pocketphi.runtime import bundle as bundles, ggml_plugin
from pocketphi.runtime.decoder_ggml import GgmlDecoder, GgmlOptions
from pocketphi.runtime.parts import TokenSpan
bundle = bundles.load(Path(sys.argv[1]))
decoder = GgmlDecoder(bundle.path(bundle.decoder), bundle.text, {}, GgmlOptions(2))
decoder.open(table="short", capacity=256, adapter=None)
state = ggml_plugin.load()
steps = [dict(ggml_plugin.counts(state))]
for n in (40, 1):
    logits = decoder.feed(TokenSpan(np.arange(100, 100 + n, dtype=np.int32)))
    assert np.isfinite(logits).all()
    steps.append(dict(ggml_plugin.counts(state)))
decoder.close()
print(json.dumps([state.active, steps]))
"""


@pytest.mark.parametrize("choice", ["auto", "stock"])
def test_the_decoder_loads_it_and_it_counts(choice: str, nano: Path) -> None:
    """Calls are counted, never inferred: a prompt and one token both go through it, or neither does."""
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(nano)],
        env=os.environ | {"POCKETPHI_KERNELS": choice},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    active, (start, prompt, token) = json.loads(done.stdout)
    if choice == "stock" or not ggml_plugin.library_path().is_file():
        assert (active, start, prompt, token) == (False, {}, {}, {})
        return
    assert active
    matrices = 4 * bundles.load(nano).text.n_layers  # qkv, output, up and gate, down
    assert start["packed_bytes"] > 0
    assert prompt["matmuls"] - start["matmuls"] >= matrices
    # llama.cpp passes the last layer's two MLP matrices the one row that gets logits.
    assert prompt["matmul_tokens"] - start["matmul_tokens"] >= 40 * (matrices - 2) + 2
    assert token["matmuls"] - prompt["matmuls"] >= matrices
    assert token["matmul_tokens"] - prompt["matmul_tokens"] >= matrices
    assert token["graphs"] > prompt["graphs"] > start["graphs"]
