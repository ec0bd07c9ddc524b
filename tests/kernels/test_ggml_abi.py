# SPDX-License-Identifier: Apache-2.0
"""What the plug-in's own declarations of ggml say, against the headers that the installed library came with.

Names clash, so two programs print the same values. The wheel has no ggml-backend-impl.h and no ggml-impl.h:
the tables of a registry, device, backend and buffer, and the head of a graph, are proven by running
(test_ggml_matmul.py and its neighbours; a graph's counts of readers by test_ggml_fusion.py).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import llama_cpp
import pytest

from ..ggml_graph import GGML

ABI = Path(__file__).parents[2] / "kernels" / "adapters" / "ggml" / "abi.h"
PUBLIC = Path(llama_cpp.__file__).parents[1] / "include"
TEXT = re.sub(r"//.*", "", ABI.read_text("utf-8"))

# Ours on the left; names that are ggml's own are their own translation.
NAMES = {
    "GGML_USAGE_ANY": "GGML_BACKEND_BUFFER_USAGE_ANY",
    "GGML_USAGE_WEIGHTS": "GGML_BACKEND_BUFFER_USAGE_WEIGHTS",
    "GGML_USAGE_COMPUTE": "GGML_BACKEND_BUFFER_USAGE_COMPUTE",
    "GGML_DEVICE_ACCEL": "GGML_BACKEND_DEVICE_TYPE_ACCEL",
}
STRUCTS = {"ggml_tensor": "struct ggml_tensor", "ggml_device_props": "struct ggml_backend_dev_props"}

# Functions the plug-in looks up by name, or gives under a name, where a public header has their type.
SIGNATURES = """
const char *(*a)(void) = ggml_version;
size_t (*b)(const struct ggml_tensor *) = ggml_nbytes;
int (*c)(struct ggml_cgraph *) = ggml_graph_n_nodes;
struct ggml_tensor *(*d)(struct ggml_cgraph *, int) = ggml_graph_node;
void (*e)(ggml_backend_t, int) = (ggml_backend_set_n_threads_t)0;
void (*f)(ggml_backend_t, bool (*)(void *), void *) = (ggml_backend_set_abort_callback_t)0;
"""


def constants() -> list[str]:
    return re.findall(r"\b(GGML_[A-Z0-9_]+) = ", TEXT)


def members(struct: str) -> list[str]:
    """Names in the order of declaration; those of a struct inside as `caps.async`."""
    (body,) = re.findall(rf"typedef struct(?: {struct})? \{{((?:(?!typedef)[\s\S])*?)\n\}} {struct};", TEXT)
    found: list[str] = []
    inner: list[str] | None = None
    for statement in re.sub(r"\s+", " ", body).split(";"):
        text = statement.strip()
        if text.startswith("struct {"):
            inner, text = [], text.removeprefix("struct {")
        if text.startswith("} "):
            assert inner is not None
            found += [text[2:], *(f"{text[2:]}.{name}" for name in inner)]
            inner = None
            continue
        names = [
            re.findall(r"(\w+)(?:\[\w+\])?$", part.strip())[0] for part in text.split(",") if part.strip()
        ]
        (found if inner is None else inner).extend(names)
    return found


def values(tmp_path: Path, name: str, head: str, public: bool) -> dict[str, int]:
    """A program with one or the other declarations, compiled and run."""
    wanted = {c: NAMES.get(c, c) if public else c for c in constants()}
    for ours, theirs in STRUCTS.items():
        struct = theirs if public else ours
        wanted[f"sizeof {ours}"] = f"sizeof({struct})"
        for member in members(ours):
            wanted[f"offset of {ours}.{member}"] = f"offsetof({struct}, {member})"
            wanted[f"size of {ours}.{member}"] = f"sizeof((({struct} *)0)->{member})"
    lines = [f'    printf("{k}\\t%lld\\n", (long long)({v}));' for k, v in wanted.items()]
    source, program = tmp_path / f"{name}.c", tmp_path / name
    source.write_text("\n".join([head, "int main(void) {", *lines, "}\n"]), "utf-8")
    cc = shutil.which("cc")
    assert cc, "no C compiler: the package needs one to be built"
    command = [cc, "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{PUBLIC if public else ABI.parent}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    out = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in (line.split("\t") for line in out.splitlines())}


def test_the_header_is_read_whole() -> None:
    assert {"GGML_TYPE_BF16", "GGML_OP_GLU", "GGML_MAX_SRC", "GGML_STATUS_ABORTED", *NAMES} <= set(
        constants()
    )
    assert members("ggml_tensor")[0] == "type"
    assert members("ggml_tensor")[-2:] == ["extra", "padding"]
    assert len(members("ggml_tensor")) == 14
    props = members("ggml_device_props")
    assert props[:2] == ["name", "description"] and props[-1] == "caps.mmap_support" and len(props) == 12


def test_layouts_and_values(tmp_path: Path) -> None:
    includes = "#include <stddef.h>\n#include <stdio.h>\n"
    ours = values(tmp_path, "ours", includes + '#include "abi.h"', public=False)
    theirs = values(
        tmp_path, "theirs", includes + '#include "ggml.h"\n#include "ggml-backend.h"', public=True
    )
    assert ours == theirs


def test_signatures(tmp_path: Path) -> None:
    source = tmp_path / "signatures.c"
    source.write_text(f'#include "ggml.h"\n#include "ggml-backend.h"\n{SIGNATURES}', "utf-8")
    cc = shutil.which("cc")
    assert cc, "no C compiler: the package needs one to be built"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{PUBLIC}"]
    subprocess.run([cc, *flags, str(source)], check=True)


def test_the_library_is_of_this_version() -> None:
    GGML.ggml_version.restype = llama_cpp.llama_cpp.ctypes.c_char_p
    assert re.findall(r'#define PK_GGML_VERSION "(.+)"', ABI.read_text("utf-8")) == [
        GGML.ggml_version().decode()
    ]


@pytest.mark.parametrize("header", ["ggml-backend-impl.h", "ggml-impl.h"])
def test_what_can_only_be_proven_by_running(header: str) -> None:
    """Should a wheel bring them one day, they belong into the comparison above."""
    assert (PUBLIC / "ggml.h").is_file()
    assert not (PUBLIC / header).exists()
