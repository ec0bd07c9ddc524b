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
SOURCES = sorted(p for p in KERNELS.rglob("*") if p.suffix in (".h", ".c", ".cpp", ".hpp"))
CORE = [p for p in SOURCES if p.relative_to(KERNELS).parts[0] not in ("adapters", "tools", "include")]
INTRINSICS = re.compile(r"\w*intrin\.h|arm_\w+\.h|cpuid\.h")
HOSTS = re.compile(
    r"ggml|llama|onnxruntime|Python\.h|pthread|threads\.h|omp\.h|stdio\.h|adapters/|tools/|^pk\.h"
)
VARIANT = re.compile(r"_(c|avx\w*|neon\w*)\.c$")
CALLS = re.compile(r"\b(malloc|calloc|realloc|aligned_alloc|free|printf|fopen|exit|abort)\s*\(")

VARIANTS = [p for p in CORE if VARIANT.search(p.name)]


def includes(path: Path, marks: str = '<"') -> list[str]:
    return re.findall(rf'^\s*#\s*include\s*[{marks}]([^>"]+)', path.read_text("utf-8"), re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(KERNELS))


def test_the_walk_finds_the_files() -> None:
    assert {"pk_cpu.h", "pk_cpu.c", "logmel/logmel.h"} <= {name(p) for p in CORE}
    assert {"logmel/logmel_c.c", "logmel/logmel_avx2.c", "logmel/logmel_neon.c"} <= {
        name(p) for p in VARIANTS
    }


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
    assert not [i for i in includes(path) if HOSTS.search(i)]
    assert not CALLS.findall(path.read_text("utf-8"))


@pytest.mark.parametrize("path", VARIANTS, ids=name)
def test_a_variant_includes_its_contract_alone(path: Path) -> None:
    contracts = {p.name for p in path.parent.glob("*.h") if path.stem.startswith(p.stem + "_")}
    assert set(includes(path, '"')) - {"pk_fp16.h"} <= contracts
    assert len(contracts) == 1


def test_adapters_do_not_include_each_other() -> None:
    adapters = {p.name for p in (KERNELS / "adapters").iterdir()}
    for path in (KERNELS / "adapters").iterdir():
        others = {i for i in includes(path, '"') if Path(i).name in adapters and Path(i).stem != path.stem}
        assert not others, path.name


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
