# SPDX-License-Identifier: Apache-2.0
"""What each probe says of a machine, in the process of the test; tests/test_doctor_cli.py has the program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pocketphi.runtime import doctor, kernels
from pocketphi.runtime.cache import CACHE_VARIABLE
from pocketphi.runtime.doctor import Finding
from pocketphi.runtime.errors import OutputError

TEXT = "self-test: text"


def no_model(_: Path | None) -> Path:
    raise OutputError("no model today")


def find(name: str) -> Finding:
    (found,) = doctor.examine([name], no_model)
    assert found.what == name and "\n" not in found.line()
    return found


def test_every_probe_is_one_finding() -> None:
    found = list(doctor.examine(doctor.names(), no_model))
    assert [f.what for f in found] == doctor.names()
    assert len(set(doctor.names())) == len(doctor.names()) == 19
    for f in found:
        assert f.line().count("\n") == 0 and f.detail
        assert f.status != "fail" or f.what.startswith("self-test"), f.detail
        assert not f.what.startswith("self-test") or f.detail == "no model today"
    json.dumps(doctor.to_object(found))


def test_the_whole_in_a_word() -> None:
    ok, warn, fail = (Finding("x", status, "") for status in ("ok", "warn", "fail"))
    assert doctor.worst([]) == doctor.worst([ok]) == "ok"
    assert doctor.worst([ok, warn, ok]) == "warn"
    assert doctor.worst([warn, fail, ok]) == "fail"
    told = doctor.to_object([Finding("disk", "warn", "little", {"free_bytes": 3})])
    assert told == {
        "status": "warn",
        "checks": {"disk": {"status": "warn", "detail": "little", "free_bytes": 3}},
    }


@pytest.mark.skipif(not kernels.is_available(), reason="needs libpk")
@pytest.mark.parametrize("kernel", ["log_mel", "matmul_q8_0"])
def test_a_kernel_that_is_a_little_wrong_is_found(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what = {"log_mel": "log-mel kernel", "matmul_q8_0": "matmul kernel"}[kernel]
    assert find(what).status == "ok"
    real = getattr(kernels, kernel)

    def wrong(*arguments: Any) -> Any:
        out = real(*arguments)
        out[3, 5] *= 1 + 2.0**-18  # a few units in the last place of one value
        return out

    monkeypatch.setattr(kernels, kernel, wrong)
    found = find(what)
    assert found.status == "fail"
    assert found.values["error"] > found.values["bound"]


def test_another_answer_is_a_failure(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = doctor.examine([TEXT], lambda _: nano)
    assert (found.status, found.values["answer"]) == ("ok", "September comes after August.")
    real = doctor._reference

    def another(name: str) -> Mapping[str, Any]:
        item = dict(real(name))
        return item | {"output_ids": [*item["output_ids"][:-2], 14, item["output_ids"][-1]], "output": "No."}

    monkeypatch.setattr(doctor, "_reference", another)
    (found,) = doctor.examine([TEXT], lambda _: nano)
    assert found.status == "fail"
    assert found.detail.startswith("'September comes after August.', expected 'No.', in ")


def test_a_damaged_model_is_a_failure(tmp_path: Path) -> None:
    (found,) = doctor.examine([TEXT], lambda _: tmp_path)
    assert (found.status, "not a model directory" in found.detail) == ("fail", True)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    found = find("cache")
    assert (found.status, found.values["writable"]) == ("warn", False)
    assert "cannot be written" in found.detail and CACHE_VARIABLE in found.detail
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "new"))
    found = find("cache")
    assert (found.status, found.values) == (
        "ok",
        {"path": str(tmp_path / "new"), "bytes": 0, "writable": True},
    )
    assert list((tmp_path / "new").iterdir()) == []


def test_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Path.home` finds one by the user's number too: it is the call that has to fail."""

    def nowhere() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    for name in ("cache", "disk"):
        found = find(name)
        assert (found.status, CACHE_VARIABLE in found.detail) == ("fail", True)


def test_cameras_are_named_and_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for /sys; the device it names is not there, so nothing can have been opened."""
    monkeypatch.setattr(doctor, "_SYSFS", tmp_path)
    monkeypatch.setattr(doctor.sys, "platform", "linux")  # type: ignore[attr-defined]
    assert find("cameras").detail == "none"
    folder = tmp_path / "class" / "video4linux" / "video77"
    folder.mkdir(parents=True)
    (folder / "name").write_bytes(b"Caf\xe9 Cam\n")
    assert find("cameras").detail == "/dev/video77: Caf\ufffd Cam"
