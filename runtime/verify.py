# SPDX-License-Identifier: Apache-2.0
"""Whether a model directory's files are those that `convert` wrote: hashed once, then known by their stat.

All are read when the directory is first opened, not each when it is first needed: before any of it reaches
native code, and never in the middle of a conversation. What was right is remembered in the cache with what
changes when a file does. A conversion does not count: what was hashed while it was written may not be what
is on the disk.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path

from .bundle import Bundle, BundleFile
from .cache import cache_directory
from .errors import BundleError, InputError, OutputError
from .files import make_folder, read_text, write_text
from .parts import Progress
from .threads import default_threads

FILE = "verified.json"  # in the cache: {"device:inode": "size:mtime:ctime:sha256"}, oldest first

_MAX_BYTES = 1 << 20  # of that file: several times what it may hold
_MOST = 1024  # files remembered: some eighty model directories
_SETTLED_NS = (
    100_000_000  # a file changed this lately may change again with no newer time: clocks tick in 10 ms
)
_BAR_AFTER_S, _BAR_EVERY_S = 2.0, 0.2

_log = logging.getLogger(__name__)


def check(bundle: Bundle, progress: Progress | None = None) -> None:
    """Compare the files of a model directory with its manifest, unless that has been done before.

    Where the cache cannot be written, they are read each time: half a second for each GB. `progress` is told
    of the bytes, where that takes more than two seconds.

    Raises:
        BundleError: a file that differs, as `Bundle.check_hashes` says it, or that cannot be read.
    """
    known, started = _read(), time.time_ns()
    stamps = {entry: _stamp(bundle, entry) for entry in bundle.files}
    new = [entry for entry, (key, value, _) in stamps.items() if known.get(key) != value]
    if not new:
        return
    new.sort(key=lambda entry: -entry.size)  # the longest first: it decides how long all take
    folder = _writable_folder()
    if folder is None:
        _log.info("%s: all files are checked each time: the cache cannot be written", bundle.root)
    _hash(bundle, new, progress)
    if folder is not None:
        found = (stamps[entry] for entry in new)
        settled = {key: value for key, value, changed in found if abs(started - changed) > _SETTLED_NS}
        _remember(folder, settled)


def _stamp(bundle: Bundle, entry: BundleFile) -> tuple[str, str, int]:
    """Which file, what of it becomes another when it changes, and when it changed last, in ns."""
    path = bundle.path(entry.path)
    try:
        s = path.stat()
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read: {exc.strerror}") from None
    value = f"{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}:{entry.sha256}"
    return f"{s.st_dev}:{s.st_ino}", value, max(s.st_mtime_ns, s.st_ctime_ns)  # anybody sets mtimes


def _hash(bundle: Bundle, files: Sequence[BundleFile], progress: Progress | None) -> None:
    """On several threads: hashlib lets go of the GIL."""
    stop, lock, done = threading.Event(), threading.Lock(), 0

    def read(n_bytes: int) -> None:
        nonlocal done
        if stop.is_set():
            raise CancelledError
        with lock:
            done += n_bytes

    with ThreadPoolExecutor(default_threads(), thread_name_prefix="pocketphi-verify") as pool:
        try:
            jobs: list[Future[None]] = [pool.submit(bundle.check_hash, f, read) for f in files]
            ended, left = wait(jobs, _BAR_AFTER_S, FIRST_EXCEPTION)
            if left and progress is not None:
                progress.start(sum(f.size for f in files), "checking")
            shown = 0
            while left and not any(job.exception() for job in ended):
                if progress is not None:
                    shown, before = done, shown
                    progress.advance(shown - before, "checking")
                ended, left = wait(jobs, _BAR_EVERY_S, FIRST_EXCEPTION)
            for job in jobs:
                if job in ended:
                    job.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            if progress is not None:
                progress.finish()


def _read() -> dict[str, str]:
    """What is remembered; nothing where that is not there or damaged."""
    try:
        found = json.loads(read_text(cache_directory() / FILE, max_bytes=_MAX_BYTES))
    except (InputError, OutputError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return {}
    return found


def _writable_folder() -> Path | None:
    try:
        folder = cache_directory()
        make_folder(folder)
    except OutputError as exc:
        _log.debug("%s", exc)
        return None
    return folder if os.access(folder, os.W_OK) else None


def _remember(folder: Path, more: Mapping[str, str]) -> None:
    """Added to what is there by now. Of two processes at once the last wins: the other reads again."""
    if not more:
        return
    kept = {key: value for key, value in _read().items() if key not in more} | dict(more)
    try:
        write_text(folder / FILE, json.dumps(dict(list(kept.items())[-_MOST:]), indent=0))
    except OutputError as exc:
        _log.debug("%s", exc)
