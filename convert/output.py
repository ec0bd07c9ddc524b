# SPDX-License-Identifier: Apache-2.0
"""Output that appears whole or not at all: a sibling temporary directory, then one rename.

The temporary is `.NAME.partial-RANDOM` beside the output, removed on any failure. Its maker holds a
lock on it while it works, so what a killed process left behind is recognised and removed next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import TracebackType

from ..runtime.bundle import MANIFEST, BundleFile
from ..runtime.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: a killed conversion's leavings stay until the user removes them
    fcntl = None  # type: ignore[assignment]


_PUSH_BYTES = 128 << 20


def _reason(exc: OSError) -> str:
    return exc.strerror or type(exc).__name__


def absolute(out: Path) -> Path:
    """Where an output is to be, whatever becomes of the working directory.

    Raises:
        OutputError: the working directory is not there any more.
    """
    try:
        return out.absolute()
    except OSError as exc:
        raise OutputError(f"{out}: there is no working directory to put it in: {_reason(exc)}") from None


class HashedFile:
    """A new file, hashed as it is written and on the disk when finished. Every failure is an OutputError.

    Large files are pushed to the disk while they are being made; pushed at the end, the last seconds
    of a conversion would be spent waiting.
    """

    def __init__(self, directory: Path, name: str) -> None:
        """Create `directory / name`, which must not exist."""
        self.path, self._name = directory / name, name
        self._digest, self._size, self._pushed = hashlib.sha256(), 0, 0
        self._pusher = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._push: Future[None] | None = None
        with self._errors():
            self._file = self.path.open("xb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._size += len(view)
        with self._errors():
            while len(view):
                view = view[self._file.write(view) :]
            if self._size - self._pushed >= _PUSH_BYTES and (self._push is None or self._push.done()):
                self._check_push()
                self._pushed = self._size
                self._push = self._pusher.submit(os.fsync, self._file.fileno())

    def _check_push(self) -> None:
        """Wait for the last push; the system tells a failure to write only once, so it must not be lost."""
        if self._push is not None:
            self._push.result()

    def pad(self, alignment: int) -> None:
        """Append zeros up to a multiple of `alignment`."""
        if missing := -self._size % alignment:
            self.write(bytes(missing))

    def finish(self) -> BundleFile:
        """Push the rest, close; name, size and SHA-256."""
        self._pusher.shutdown()
        with self._errors():
            self._check_push()
            os.fsync(self._file.fileno())
            self._file.close()
        return BundleFile(self._name, self._size, self._digest.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pusher.shutdown()
        with contextlib.suppress(OSError):
            self._file.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise OutputError(f"{self.path}: cannot be written: {_reason(exc)}") from None


def write_file(directory: Path, name: str, data: bytes) -> BundleFile:
    """Write one small file whole."""
    with HashedFile(directory, name) as file:
        file.write(data)
        return file.finish()


@contextlib.contextmanager
def one_at_a_time(folder: Path, patience: float = 30.0) -> Iterator[None]:
    """Hold the lock on a folder, made if need be. What cannot be made or locked is the writer's to refuse.

    Args:
        patience: seconds to wait for another process. One that is stopped must not hang the others,
            so after that the block runs all the same; outputs still appear whole.
    """
    handle = None
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        end = time.monotonic() + patience
        while handle is not None and _lock(handle) is False and time.monotonic() < end:
            time.sleep(0.02)
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def new_directory(out: Path, need_bytes: int, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary directory that becomes `out` when the block ends, and vanishes when it raises.

    Args:
        need_bytes: compared with the free disk space first; what an overwritten output takes is
            not counted as free, since it stays until the new one is whole.
        overwrite: replace a model directory that is there. Anything else is never replaced.

    Raises:
        OutputError: the output exists, its parent cannot be written, or the disk is too small.
    """
    out = absolute(out)
    if out.is_symlink():
        out = out.resolve()
    check_free(out, overwrite=overwrite)
    _remove_dead(out)
    partial, lock = _new_partial(out)
    try:
        _check_space(out.parent, need_bytes)
        yield partial
        _replace(partial, out, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse an output place that is taken. An empty directory is free.

    Raises:
        OutputError: something is there that may not be replaced.
    """
    try:
        try:
            out.lstat()  # not lexists: that takes a name too long for one that is free
        except FileNotFoundError:
            return
        if not out.is_dir():
            raise OutputError(f"{out}: exists and is not a directory")
        if not any(out.iterdir()):
            return
        if not overwrite:
            raise OutputError(f"{out}: exists and is not empty: choose another place, or overwrite it")
        if not (out / MANIFEST).is_file():
            raise OutputError(
                f"{out}: is not a model directory (it has no {MANIFEST}): it is not overwritten"
            )
        if (stranger := _stranger(out)) is not None:
            raise OutputError(f"{stranger}: no conversion wrote it: its folder is not overwritten")
    except OSError as exc:
        raise OutputError(f"{out}: cannot be looked into: {_reason(exc)}") from None


def _stranger(out: Path) -> Path | None:
    """Something in a model directory that its manifest does not list, such as the checkpoint it came from.

    Hidden files are the system's. Of a manifest that cannot be read, every file is taken for the model's.
    """
    try:
        listed = {
            PurePosixPath(f["path"]).parts[0] for f in json.loads((out / MANIFEST).read_bytes())["files"]
        }
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        listed = {path.name for path in out.iterdir() if not path.is_dir()}
    known = listed | {MANIFEST}
    return next(
        (p for p in sorted(out.iterdir()) if p.name not in known and not p.name.startswith(".")), None
    )


def _check_space(parent: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < need_bytes:
        raise OutputError(f"{parent}: has {free:,} bytes free, the output needs {need_bytes:,}")


def _new_partial(out: Path) -> tuple[Path, int | None]:
    """A locked temporary directory. Another process may see it before the lock: then try another name."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(100):
            partial = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
            partial.mkdir()
            if fcntl is None:
                return partial, None
            with contextlib.suppress(FileNotFoundError):  # already taken for one of the dead
                lock = os.open(partial, os.O_RDONLY)
                if _lock(lock) is not False and partial.is_dir():
                    return partial, lock
                os.close(lock)
    except OSError as exc:
        raise OutputError(f"{out}: cannot be created in {out.parent}: {_reason(exc)}") from None
    raise OutputError(f"{out}: cannot be created: temporary directories vanish as soon as they are made")


def _remove_dead(out: Path) -> None:
    """Remove what killed conversions to the same place left behind."""
    with contextlib.suppress(OSError):
        if fcntl is not None:
            for path in out.parent.glob(f".{_escaped(out.name)}.partial-*"):
                _remove_if_dead(path)
        if out.is_dir():  # without it, what it would have replaced is the only copy
            for path in _replaced(out):
                shutil.rmtree(path, ignore_errors=True)


def _replaced(out: Path) -> list[Path]:
    """Earlier outputs that could not be removed, or whose replacer was killed half-way."""
    return list(out.parent.glob(f".{_escaped(out.name)}.replaced-*"))


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _lock(handle: int) -> bool | None:
    """Lock an open directory: False when another process holds it, None where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_if_dead(partial: Path) -> None:
    """Remove a temporary directory whose maker lives no more; the lock is held meanwhile."""
    with contextlib.suppress(OSError):  # gone by itself
        lock = os.open(partial, os.O_RDONLY)
        try:
            if _lock(lock):
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)


def _replace(partial: Path, out: Path, *, overwrite: bool) -> None:
    check_free(out, overwrite=overwrite)  # again: another process may have been faster
    try:
        old, replaced = None, _replaced(out)
        if out.is_dir():
            if any(out.iterdir()):
                old = out.parent / f".{out.name}.replaced-{secrets.token_hex(4)}"
                out.rename(old)
                replaced.append(old)
            else:
                out.rmdir()
        try:
            partial.rename(out)
        except OSError:
            if old is not None:
                old.rename(out)
            raise
    except OSError as exc:
        raise OutputError(f"{out}: cannot be put in place: {_reason(exc)}") from None
    for path in replaced:
        shutil.rmtree(path, ignore_errors=True)
