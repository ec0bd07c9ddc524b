# SPDX-License-Identifier: Apache-2.0
"""The same items on a Ray cluster of this machine with two workers: the same outcomes, whoever dies."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pocketphi.bulk.lines import LineFile
from pocketphi.bulk.ray_pool import Answerer, RayOptions, RayPool
from pocketphi.bulk.records import Outcome
from pocketphi.runtime.errors import BundleError

from .batch_items import CALL, QUESTIONS, mixed, plain, read_lines, settings, user, write_lines

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pocketphi[ray]"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


@pytest.fixture(scope="module")
def cluster(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:
    """One for all tests: most of what they take is its start."""
    path = write_lines(tmp_path_factory.mktemp("ray") / "in.jsonl", [*mixed(), b"not json"])
    with LineFile(path) as file, RayPool(file, *settings(nano, file), RayOptions(n_workers=2)) as pool:
        yield pool


def outcomes(pool: RayPool) -> dict[str, Outcome]:
    """Of all items, each once."""
    found: dict[str, Outcome] = {}
    for entry, outcome in pool.run(pool._file.entries):
        assert entry.id not in found
        found[entry.id] = outcome
        pool.taken()
    return found


def test_the_same_as_alone(cluster: RayPool, expected: dict[str, dict[str, Any]]) -> None:
    found = outcomes(cluster)
    assert not found.pop("line-9").ok
    assert {name: plain(one.record) for name, one in found.items()} == expected


def test_an_actor_that_is_killed_loses_nothing(
    cluster: RayPool, nano: Path, tmp_path: Path, expected: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Once, at its second item: Ray makes another, and its items are done again."""
    sign = tmp_path / "killed"
    call = Answerer.__call__

    class Mortal(Answerer):
        calls = 0

        def __call__(self, batch: Any) -> Any:
            self.calls += 1
            if self.calls == 2 and not sign.exists():
                sign.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return call(self, batch)

    monkeypatch.setattr("pocketphi.bulk.ray_pool.Answerer", Mortal)
    found = outcomes(cluster)
    assert sign.exists()
    assert not found.pop("line-9").ok
    assert {name: plain(one.record) for name, one in found.items()} == expected


def test_another_model_on_a_machine_is_refused(cluster: RayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_model", replace(cluster._model, manifest_sha256="0" * 64))
    with pytest.raises(BundleError, match=r": .*is another model than where the run was started"):
        outcomes(cluster)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="says who listens")
def test_it_is_on_loopback_alone(cluster: RayPool) -> None:
    """Every socket that waits for others, of the processes that the cluster began."""
    ours = {str(fd.readlink()) for pid in descendants(os.getpid()) for fd in open_files(pid)}
    listening = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in ours:
                listening.append(fields[1].partition(":")[0])
    assert listening
    loopback = {"0100007F", "0" * 16 + "FFFF00000100007F", "0" * 24 + "01000000"}
    assert set(listening) <= loopback


def open_files(pid: int) -> list[Path]:
    found = []
    try:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            if fd.is_symlink() and str(fd.readlink()).startswith("socket:"):
                found.append(fd)
    except OSError:
        pass
    return found


def descendants(pid: int) -> set[int]:
    """A process, and all that it and those have started."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(stat.parent.name))
    found, left = {pid}, [pid]
    while left:
        more = parents.get(left.pop(), [])
        found.update(more)
        left += more
    return found


def test_from_the_command_line(cluster: RayPool, nano: Path, env: dict[str, str], tmp_path: Path) -> None:
    """On a cluster that runs already; what it did is gone on with here, without one."""
    items = [{"id": f"q{i}", "messages": user(text)} for i, text in enumerate(QUESTIONS)]
    path, out = write_lines(tmp_path / "in.jsonl", items[:4]), tmp_path / "out.jsonl"
    job = [*CALL, "batch", str(path), "-o", str(out), "-m", str(nano)]
    knowing = env | {"RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
    done = subprocess.run(
        [*job[:-4], "--ray", cluster.address, *job[-4:], "--workers", "1"],
        env=knowing, capture_output=True, timeout=120, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    write_lines(path, items)
    assert subprocess.run(job, env=env, check=False, timeout=120, capture_output=True).returncode == 0
    found = read_lines(out)
    assert set(found) == {item["id"] for item in items}
    assert all(record["status"] == "ok" for record in found.values())


def test_no_such_cluster(nano: Path, env: dict[str, str], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"id": "a", "messages": user("Hi")}])
    done = subprocess.run(
        [*CALL, "batch", str(path), "--ray", "nonsense", "-o", str(tmp_path / "out.jsonl"), "-m", str(nano)],
        env=env, capture_output=True, timeout=120, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ray: nonsense: no cluster: ")
