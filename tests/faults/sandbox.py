# SPDX-License-Identifier: Apache-2.0
"""What a process does to itself before it becomes the program: disks of its own, and no powers of root.

Imported by processes forked for one case (see `worlds`): nothing of it changes the machine for anybody else.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import struct

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
_RDONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18  # MS_…
_SET_SECUREBITS, _NO_SETUID_FIXUP = 28, 4  # PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP
_CAPABILITIES_3 = 0x20080522  # _LINUX_CAPABILITY_VERSION_3


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def own_mounts() -> None:
    """From here on, what this process mounts is mounted for itself alone."""
    _call("unshare", _NEW_MOUNTS if os.geteuid() == 0 else _NEW_MOUNTS | _NEW_USER)
    _call("mount", b"none", b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None)


def small_disk(path: str, options: str) -> None:
    """An empty tmpfs over a folder: "size=64k", "nr_inodes=5"."""
    own_mounts()
    _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", ctypes.c_ulong(0), options.encode())


def read_only(path: str) -> None:
    """A folder that nobody can write to, root included."""
    own_mounts()
    where = os.fsencode(path)
    _call("mount", where, where, None, ctypes.c_ulong(_BIND), None)
    _call("mount", where, where, None, ctypes.c_ulong(_BIND | _REMOUNT | _RDONLY), None)


def powerless() -> None:
    """Root without root's powers: the bits of files and folders count."""
    header = struct.pack("<Ii", _CAPABILITIES_3, 0)
    _call("capset", ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


def largest_file(n_bytes: int) -> None:
    """No file may become larger."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def fill(path: str, content: str) -> None:
    """A file that is there before the program begins."""
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123 - imports nothing that a fork has not
        file.write(content)


def stdout_to(path: str) -> None:
    """As the shell's `> path`."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(handle, 1)
    os.close(handle)


def keep(path: str, into: str) -> None:
    """When the program has ended, copy what lies on a disk of its own to where others see it."""
    atexit.register(shutil.copytree, path, into, symlinks=True)


def unknown_user() -> None:
    """A user whom the system's list does not have, as in containers: there is no home to look up.

    Root's powers are kept, for the tests' folders are the tester's alone.
    """
    import pwd

    known = {entry.pw_uid for entry in pwd.getpwall()}
    number = next(n for n in range(54321, 60000) if n not in known)
    _call("prctl", _SET_SECUREBITS, ctypes.c_ulong(_NO_SETUID_FIXUP))
    os.setresuid(number, number, number)
