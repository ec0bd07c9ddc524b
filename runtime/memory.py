# SPDX-License-Identifier: Apache-2.0
"""How much memory this process may still take: what the machine, its control groups and its own limits leave.

What the system can take back is available: the page cache, a model file mapped into memory with it, and swap.
So the answer is rather too much than too little, and a request that exceeds it cannot be met. Not so with
ZFS: its cache (ARC) is no page cache, the kernel counts it as used though it is given back, and the answer
may be too little by it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Literal

from .errors import InputError, MemoryShortError

VARIABLE = "POCKETPHI_MEMORY_CHECK"

_CHOICES = ("on", "off")
_NO_LIMIT = 1 << 60  # bytes; groups of version 1 say "none" with a number near 2^63
_MAX_BYTES = 1 << 50  # what a size may be at most: 1 PiB
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,6})?) ?([KMGT]?)(?:i?B)?", re.ASCII | re.IGNORECASE)

Kind = Literal["resident", "data", "address"]
"""What a limit counts: pages in memory, private writable memory, or all of the address space."""


@dataclass(frozen=True, slots=True)
class Room:
    """What one limit leaves."""

    n_bytes: int  # from 0
    limit: str  # whose it is, for a message
    kind: Kind = "resident"
    soft: bool = False  # beyond it a process is slowed down, not stopped: nothing is refused for it


@dataclass(frozen=True, slots=True)
class _GroupVersion:
    """Where a control group keeps its numbers."""

    limit: str
    soft_limit: str | None
    used: str
    reclaimable: tuple[str, ...]  # lines of memory.stat
    with_swap: tuple[str, str] | None  # limit and use of memory and swap together
    swap: tuple[str, str] | None  # of swap alone


@dataclass(frozen=True, slots=True)
class _Mount:
    """A hierarchy of control groups."""

    kind: str  # of file system
    where: str
    top: str  # which group is there


_V1 = _GroupVersion(
    "memory.limit_in_bytes",
    None,
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
    None,
)
_V2 = _GroupVersion(
    "memory.max",
    "memory.high",
    "memory.current",
    ("inactive_file", "active_file", "slab_reclaimable"),
    None,
    ("memory.swap.max", "memory.swap.current"),
)


def rooms(root: Path = Path("/"), rlimits: Mapping[str, int] | None = None) -> list[Room]:
    """What each limit leaves this process; none is known where the system is not Linux.

    Args:
        root: where `proc` and the control groups are, for tests.
        rlimits: this process's soft limits by name, "RLIMIT_AS" and "RLIMIT_DATA"; None: ask the system.
    """
    found = list(_machine(root))
    swap = _meminfo(root).get("SwapFree", 0)
    for group, version in _groups(root):
        found += _room_of(group, version, swap)
    return found + _own_limits(root, own_rlimits() if rlimits is None else rlimits)


def available(root: Path = Path("/"), rlimits: Mapping[str, int] | None = None) -> Room | None:
    """The smallest of what the limits on memory leave, soft ones included; None where no limit is known."""
    return min(
        (r for r in rooms(root, rlimits) if r.kind != "address"), key=lambda r: r.n_bytes, default=None
    )


def check_wanted() -> bool:
    """Whether a request that cannot be met is to be refused before it is tried.

    Raises:
        InputError: POCKETPHI_MEMORY_CHECK is neither `on` nor `off`.
    """
    value = os.environ.get(VARIABLE, "") or "on"
    if value not in _CHOICES:
        raise InputError(f"{VARIABLE} is {value[:40]!r}, expected one of {', '.join(_CHOICES)}")
    return value == "on"


def shortage(
    needed: int, *, idle: int = 0, mapped: int = 0, among: list[Room] | None = None
) -> tuple[Room, int] | None:
    """The limit that leaves the least and what it counts, if that is more.

    Args:
        needed: bytes that will be written to and stay.
        idle: bytes that will be asked for and not be touched; they are not resident.
        mapped: bytes of files that will be mapped at the same time: they take addresses alone.
        among: from `rooms`; None: ask now.
    """
    counted = {"resident": needed, "data": needed + idle, "address": needed + idle + mapped}
    all_of_them = [
        (room, counted[room.kind]) for room in (rooms() if among is None else among) if not room.soft
    ]
    short = [(room, count) for room, count in all_of_them if room.n_bytes < count]
    return min(short, key=lambda found: found[0].n_bytes, default=None)


def require(
    what: str, needed: int, advice: str | Callable[[int], str], *, idle: int = 0, mapped: int = 0
) -> None:
    """Refuse what cannot be had; says nothing where the check is off or nothing is known.

    Args:
        what: needs the memory; opens the message.
        needed, idle, mapped: as for `shortage`.
        advice: what would fit, or what says that for the bytes that are missing.

    Raises:
        MemoryShortError: a limit leaves less.
        InputError: POCKETPHI_MEMORY_CHECK has no such value.
    """
    if not check_wanted():
        return
    short = shortage(needed, idle=idle, mapped=mapped)
    if short is not None:
        room, count = short
        advice = advice if isinstance(advice, str) else advice(count - room.n_bytes)
        raise MemoryShortError(
            f"{what} needs {_size(count)} of memory, {room.limit} leaves {_size(room.n_bytes)}: {advice}"
        )


def parse_bytes(text: str, what: str = "size") -> int:
    """A size such as 8G, 7.5GiB, 512M or 8000000000; the units are powers of 1024.

    Raises:
        InputError: it is none, is 0, or more than 1 PiB.
    """
    match = _SIZE.fullmatch(text.strip())
    n_bytes = int(Fraction(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not 0 < n_bytes <= _MAX_BYTES:
        raise InputError(f"{what} is {text[:40]!r}, expected a size such as 8G, 7.5GiB, 512M or 8000000000")
    return n_bytes


def own_rlimits() -> dict[str, int]:
    """This process's soft limits in bytes, where it has any."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    names = (name for name in ("RLIMIT_AS", "RLIMIT_DATA") if hasattr(resource, name))
    soft = {name: resource.getrlimit(getattr(resource, name))[0] for name in names}
    return {name: limit for name, limit in soft.items() if limit != resource.RLIM_INFINITY}


def stack_bytes() -> int:
    """What a new thread's stack takes of the address space; 0 where it is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return 2 << 20 if soft == resource.RLIM_INFINITY else min(soft, 8 << 20)  # glibc's own for "no limit"


def _machine(root: Path) -> Iterator[Room]:
    """MemAvailable is the kernel's own estimate of what can be had without swapping, page cache included."""
    info = _meminfo(root)
    if "MemAvailable" in info:
        yield Room(info["MemAvailable"] + info.get("SwapFree", 0), "this machine")


def _meminfo(root: Path) -> dict[str, int]:
    return _table(root / "proc/meminfo")


def _own_limits(root: Path, rlimits: Mapping[str, int]) -> list[Room]:
    used = _table(root / "proc/self/status")
    kinds: tuple[tuple[str, str, Kind], ...] = (
        ("RLIMIT_AS", "VmSize", "address"),
        ("RLIMIT_DATA", "VmData", "data"),
    )
    return [
        Room(max(rlimits[name] - used[line], 0), f"{name} ({_size(rlimits[name])})", kind)
        for name, line, kind in kinds
        if name in rlimits and line in used
    ]


def _groups(root: Path) -> Iterator[tuple[Path, _GroupVersion]]:
    """The memory control groups of this process, from its own up to the outermost that can be seen."""
    mounts = _mounts(root)
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            kind, version = "cgroup2", _V2
        elif "memory" in controllers.split(","):
            kind, version = "cgroup", _V1
        else:
            continue
        seen = [(mount, _below(mount.top, group)) for mount in mounts if mount.kind == kind]
        inside = [(mount, parts) for mount, parts in seen if parts is not None]
        # A group that is in none of them is seen as the mounted one, in a container without a namespace.
        for mount, parts in inside or [(mount, ()) for mount, _ in seen]:
            folder = root / mount.where.lstrip("/")
            for n in range(len(parts), -1, -1):
                yield folder.joinpath(*parts[:n]), version


def _mounts(root: Path) -> list[_Mount]:
    """Where memory control groups are mounted, each place once: proc_pid_mountinfo(5)."""
    found: dict[_Mount, None] = {}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        if kind[0] == "cgroup2" or "memory" in kind[2].split(","):
            found[_Mount(kind[0], _unescaped(fields[4]), _unescaped(fields[3]))] = None
    return list(found)


def _below(top: str, group: str) -> tuple[str, ...] | None:
    """The group's path under the mounted one; None if it is not under it."""
    try:
        parts = PurePosixPath(group).relative_to(PurePosixPath(top)).parts
    except ValueError:
        return None
    return None if ".." in parts else parts


def _room_of(folder: Path, version: _GroupVersion, swap_free: int) -> Iterator[Room]:
    limit, used = _number(folder / version.limit), _number(folder / version.used)
    soft = None if version.soft_limit is None else _number(folder / version.soft_limit)
    if used is None:
        return
    stat = _table(folder / "memory.stat")
    back = min(sum(stat.get(name, 0) for name in version.reclaimable), used)
    name = f"the control group {folder.name}"
    swap = swap_free
    if version.swap is not None:
        most, now = (_number(folder / n) for n in version.swap)
        swap = swap if most is None else min(swap, max(most - (now or 0), 0))
    if limit is not None:
        yield Room(max(limit - used + back, 0) + swap, name)
    if soft is not None:
        yield Room(max(soft - used + back, 0) + swap, name, soft=True)
    if version.with_swap is not None:
        most, now = (_number(folder / n) for n in version.with_swap)
        if most is not None and now is not None:
            yield Room(max(most - now + back, 0), name)


def _number(path: Path) -> int | None:
    """A limit or a use; None for "max", for a number that means none, and where there is no such file."""
    text = _text(path).strip()
    if not text.isascii() or not text.isdecimal() or int(text) >= _NO_LIMIT:
        return None
    return int(text)


def _table(path: Path) -> dict[str, int]:
    """Lines "name number" or "name: number kB", in bytes."""
    found = {}
    for line in _text(path).splitlines():
        fields = line.replace(":", " ").split()
        if len(fields) >= 2 and fields[1].isascii() and fields[1].isdecimal():
            found[fields[0]] = int(fields[1]) * (1024 if fields[2:] == ["kB"] else 1)
    return found


def _text(path: Path) -> str:
    """A small file of the kernel's; empty where there is none."""
    try:
        with path.open("rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return ""


def _unescaped(field: str) -> str:
    """Spaces are octal in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)


def _size(n_bytes: int) -> str:
    gib = n_bytes / (1 << 30)
    return f"{gib:.2f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB"
