# SPDX-License-Identifier: Apache-2.0
"""`pocketphi doctor` where all is well, and where one thing after the other is not: never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pocketphi
from pocketphi.runtime import doctor, ggml_plugin, kernels

CALL = [sys.executable, "-c", "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"]
ANSWERS = {
    "self-test: text": "September comes after August.",
    "self-test: a picture": "There is a large green circle on the left.",
    "self-test: speech": "The small friend jumps in the garden.",
}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are found differently")


def call(env: dict[str, str], *args: str) -> tuple[int, str]:
    """Exit code and stdout; nothing may be on stderr."""
    done = subprocess.run(
        [*CALL, "doctor", *args], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def checks(env: dict[str, str], code: int) -> dict[str, dict[str, Any]]:
    found_code, out = call(env, "--json")
    told = json.loads(out)
    assert (found_code, told["status"] == "fail") == (code, code == 1), out
    found: dict[str, dict[str, Any]] = told["checks"]
    assert list(found) == doctor.names()
    return found


def statuses(found: dict[str, dict[str, Any]], status: str) -> set[str]:
    return {what for what, check in found.items() if check["status"] == status}


def test_a_line_for_each_finding(env: dict[str, str]) -> None:
    code, out = call(env)
    lines = out.splitlines()
    assert code == 0
    assert [line[6:30].strip() for line in lines] == doctor.names()
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    for what, answer in ANSWERS.items():
        assert any(line.startswith(f"ok    {what}") and f"'{answer}', in " in line for line in lines)


@linux
def test_stock_kernels_no_portaudio_and_no_cache(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "libportaudio.so.2").write_bytes(b"")
    changed = {
        "POCKETPHI_KERNELS": "stock",
        "POCKETPHI_CACHE": str(tmp_path / "libportaudio.so.2" / "cache"),
        "LD_LIBRARY_PATH": str(tmp_path),
    }
    found = checks(env | changed, 0)
    assert statuses(found, "warn") >= {"microphones", "cache"}
    assert found["kernels"]["status"] == "ok" and found["kernels"]["active"] is False
    assert "libportaudio2" in found["microphones"]["detail"]
    assert {what: found[what]["answer"] for what in ANSWERS} == ANSWERS


def package(folder: Path, env: dict[str, str]) -> tuple[Path, dict[str, str]]:
    """The package as links, with an empty folder for native libraries; and an environment that uses it."""
    source, copy = Path(pocketphi.__file__).parent, folder / "pocketphi"
    (copy / "lib").mkdir(parents=True)
    for part in ("runtime", "convert", "evaluate", "cli", "nano"):
        (copy / part).symlink_to((source / part).resolve())
    shutil.copy(pocketphi.__file__, copy)
    return copy / "lib", env | {"PYTHONPATH": str(folder), "POCKETPHI_CACHE": str(folder / "cache")}


def test_a_package_without_native_libraries(env: dict[str, str], tmp_path: Path) -> None:
    lib, changed = package(tmp_path, env)
    found = checks(changed, 0)
    assert str(lib.parent) in found["pocketphi"]["detail"], "or another package was asked"
    assert statuses(found, "warn") >= {"CPU", "kernels", "log-mel kernel", "matmul kernel"}
    assert "built without" in found["kernels"]["detail"]
    assert {what: found[what]["answer"] for what in ANSWERS} == ANSWERS


@linux
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler to make the wrong library")
def test_a_library_that_kills_and_one_that_is_none(env: dict[str, str], tmp_path: Path) -> None:
    """What an instruction that the CPU lacks does to a process, without its core file."""
    lib, changed = package(tmp_path, env)
    source = tmp_path / "killer.c"
    source.write_text(
        "#include <signal.h>\n__attribute__((constructor)) static void die(void) { raise(SIGKILL); }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", lib / kernels.library_path().name, source], check=True)
    (lib / ggml_plugin.library_path().name).write_bytes(b"not a library\n" * 100)
    found = checks(changed, 1)
    killed = {"CPU", "log-mel kernel", "matmul kernel", *ANSWERS}  # the converter needs the library too
    assert statuses(found, "fail") == killed
    for what in killed:
        assert found[what]["detail"] == f"the probe ended: killed by {signal.SIGKILL.name}"
    assert found["kernels"]["status"] == "warn"
    assert "libpk_ggml.so cannot be loaded" in found["kernels"]["detail"]
    assert {found[what]["status"] for what in ("threads", "llama.cpp", "ONNX Runtime", "disk")} == {"ok"}


def test_settings_that_mean_nothing(env: dict[str, str], tmp_path: Path) -> None:
    """Both variables wrong: what needs a native library fails in one line each, the rest is still said."""
    found = checks(env | {"POCKETPHI_KERNELS": "fast", "POCKETPHI_CPU_MASK": "sse9"}, 1)
    assert statuses(found, "fail") >= {"CPU", "llama.cpp", "kernels", "matmul kernel", *ANSWERS}
    assert found["kernels"]["detail"] == "POCKETPHI_KERNELS is 'fast', expected one of auto, stock"
    assert "POCKETPHI_CPU_MASK is 'sse9'" in found["CPU"]["detail"]
    assert found["threads"]["status"] == found["disk"]["status"] == "ok"


def test_a_package_whose_model_is_gone(env: dict[str, str], tmp_path: Path) -> None:
    lib, changed = package(tmp_path, env)
    (lib.parent / "nano").unlink()
    found = checks(changed, 1)
    assert statuses(found, "fail") == set(ANSWERS)
    assert "no such file" in found["self-test: text"]["detail"]


@linux
def test_ctrl_c_ends_it_quietly(env: dict[str, str]) -> None:
    """The whole process group hears it, as from a terminal; nobody is left behind to go on."""
    process = subprocess.Popen(
        [*CALL, "doctor"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()  # one is running
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    deadline = time.monotonic() + 20
    while True:  # every process of the group has ended
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
