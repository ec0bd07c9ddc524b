# SPDX-License-Identifier: Apache-2.0
"""What the C files may include and call, and that header, library and binding agree."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from pocketphi.runtime import kernels

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
FAMILIES = {"attention", "logmel", "lora", "matmul", "probe", "quantize", "vector"}
SOURCES = sorted(p for p in KERNELS.rglob("*") if p.suffix in (".h", ".c", ".cpp", ".hpp"))
CORE = [p for p in SOURCES if p.relative_to(KERNELS).parts[0] not in ("adapters", "tools", "fuzz", "include")]
ADAPTERS = [p for p in SOURCES if p.relative_to(KERNELS).parts[0] == "adapters"]
INTRINSICS = re.compile(r"\w*intrin\.h|arm_\w+\.h|cpuid\.h")
HOSTS = re.compile(
    r"ggml|llama|onnxruntime|Python\.h|pthread|threads\.h|omp\.h|stdio\.h|adapters/|tools/|(^|/)pk\.h"
)
HOST_HEADERS = re.compile(r"(^|/)(ggml|gguf|llama|onnxruntime|Python)")
VARIANT = re.compile(r"_(c|avx\w*|neon\w*)\.c$")
CALLS = re.compile(
    r"\b(malloc|calloc|realloc|aligned_alloc|posix_memalign|free|\w*printf|fopen|exit|abort|pthread_\w+)\s*\("
)

VARIANTS = [p for p in CORE if VARIANT.search(p.name)]


def included(text: str, marks: str = '<"') -> list[str]:
    return re.findall(rf'^\s*#\s*include\s*[{marks}]([^>"]+)', text, re.MULTILINE)


def includes(path: Path, marks: str = '<"') -> list[str]:
    return included(path.read_text("utf-8"), marks)


def name(path: Path) -> str:
    return str(path.relative_to(KERNELS))


def wrong_in_core(text: str) -> list[str]:
    """What a core file may neither include nor call. Comments are read too: they name nothing of this."""
    return [i for i in included(text) if HOSTS.search(i)] + CALLS.findall(text)


def wrong_in_adapter(path: Path, text: str) -> list[str]:
    """Headers of ours other than the core's, the adapter's own and, for the C API, pk.h; and any host's.

    An adapter is a file and the header of its name, or a folder. Two adapters never share a header.
    """
    headers = {name(p) for p in CORE if p.suffix == ".h"}
    if path.parent.name == "adapters":
        headers |= {path.with_suffix(".h").name, "pk.h"}
    else:
        headers |= {p.name for p in path.parent.glob("*.h")}
    return [i for i in included(text, '"') if i not in headers] + [
        i for i in included(text, "<") if HOST_HEADERS.search(i) or (KERNELS / i).exists()
    ]


def test_the_walk_finds_the_files() -> None:
    assert {p.relative_to(KERNELS).parts[0] for p in CORE} == FAMILIES | {"pk_cpu.h", "pk_cpu.c", "pk_fp16.h"}
    found = {name(p) for p in VARIANTS}
    assert {f"{f}/{f}_c.c" for f in FAMILIES} <= found
    assert {"logmel/logmel_neon.c", "matmul/matmul_many_avx512vnni.c", "matmul/activations_avx2.c"} <= found
    assert {"adapters/capi.c", "adapters/ggml/abi.h", "adapters/ggml/plugin.c"} <= {name(p) for p in ADAPTERS}


def test_every_file_is_built() -> None:
    text = (ROOT / "CMakeLists.txt").read_text("utf-8")
    text = re.sub(r"threads_\$<.*>\.c", "threads_openmp.c kernels/adapters/ggml/threads_pool.c", text)
    built = set(re.findall(r"kernels/([\w/]+\.c)\b", text))
    counted = {"tools/pk_count.c", "tools/qemu_count.c"}  # by tools/qemu_check.sh
    assert built == {name(p) for p in SOURCES if p.suffix == ".c"} - counted


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_file(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert lines[0] == "// SPDX-License-Identifier: Apache-2.0"
    assert lines[1].startswith(f"// {path.name} - ")
    assert len(lines) <= 600


def test_intrinsics_are_in_variants_alone() -> None:
    users = {p for p in SOURCES if any(map(INTRINSICS.fullmatch, includes(p)))}
    assert users - set(VARIANTS) == {KERNELS / "pk_cpu.c"}  # which asks the CPU


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_knows_no_host(path: Path) -> None:
    assert not wrong_in_core(path.read_text("utf-8"))


@pytest.mark.parametrize("path", VARIANTS, ids=name)
def test_a_variant_includes_its_contract_alone(path: Path) -> None:
    contracts = {p.name for p in path.parent.glob("*.h") if path.stem.startswith(p.stem + "_")}
    assert set(includes(path, '"')) - {"pk_fp16.h"} <= contracts
    assert len(contracts) == 1


@pytest.mark.parametrize("path", ADAPTERS, ids=name)
def test_an_adapter_includes_its_own_headers_and_the_core(path: Path) -> None:
    assert not wrong_in_adapter(path, path.read_text("utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        '#include "ggml.h"',
        "#include <onnxruntime_c_api.h>",
        "#include <Python.h>",
        "#include <stdio.h>",
        "#include <pthread.h>",
        '#include "../adapters/ggml/plugin.h"',
        '#  include "pk.h"',
        "p = malloc(n);",
        'fprintf (stderr, "");',
    ],
)
def test_the_core_rule_can_fail(line: str) -> None:
    assert wrong_in_core(f"#include <stddef.h>\n{line}\n")
    assert not wrong_in_core('#include <math.h>\n#include "matmul.h"\n')


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ("ggml/plan.c", '#include "ggml.h"'),
        ("ggml/plan.c", "#include <ggml-backend.h>"),
        ("ggml/plan.c", '#include "pk.h"'),
        ("ggml/plan.c", '#include "../capi.h"'),
        ("ggml/plan.c", "#include <matmul/matmul.h>"),
        ("ggml/plan.c", '#include "matmul/matmul_avx2.c"'),
        ("capi.c", '#include "ggml/plugin.h"'),
        ("capi.c", '#include "plugin.h"'),
        ("capi_matmul.c", '#include "capi.h"'),
    ],
)
def test_the_adapter_rule_can_fail(adapter: str, line: str) -> None:
    path = KERNELS / "adapters" / adapter
    assert wrong_in_adapter(path, f"#include <stddef.h>\n{line}\n")
    assert not wrong_in_adapter(path, '#include <stdlib.h>\n#include "matmul/matmul.h"\n')


def test_no_native_build_flags() -> None:
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text("utf-8"))
    assert not re.findall(r"-march=native|-mcpu=native|-ffast-math|-Ofast", text)
    assert "-ffp-contract=off" in text


def test_header_library_and_binding_agree() -> None:
    header = (KERNELS / "include" / "pk.h").read_text("utf-8")
    declared = re.findall(r"^PK_EXPORT [^(]*?(\w+)\(", header, re.MULTILINE)
    assert re.findall(r"#define PK_ABI (\d+)", header) == [str(kernels.ABI)]
    binding = (ROOT / "runtime" / "kernels.py").read_text("utf-8")
    assert sorted(declared) == sorted(re.findall(r'^ +"(pk_\w+)": \(', binding, re.MULTILINE))
    library = ctypes.CDLL(str(kernels.library_path()))
    assert all(hasattr(library, symbol) for symbol in declared)
    assert not hasattr(library, "pk_logmel_c"), "the core is hidden"


def test_the_library_is_the_package_version() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    assert re.findall(r'^version = "(.+)"$', pyproject, re.MULTILINE) == [kernels.version()]
