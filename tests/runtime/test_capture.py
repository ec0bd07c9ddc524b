# SPDX-License-Identifier: Apache-2.0
"""Recording through PortAudio, from a virtual microphone that plays real speech; and machines without one."""

from __future__ import annotations

import ctypes.util
import json
import os
import signal
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime import audio
from pocketphi.runtime.capture import Device, best_form, choose
from pocketphi.runtime.errors import InputError

from ..microphone import VirtualMicrophone, virtual_microphone

ROOT = Path(__file__).resolve().parent.parent
SPEECH = ROOT / "audio" / "1272-141231-0002.mp3"  # 16 kHz mono

# Says "recording" when it does, records until Ctrl-C or the end, then says what it has got.
RECORD = """
import json, signal, sys, time
import numpy as np
from pocketphi.runtime.capture import Microphone
from pocketphi.runtime.errors import InputError

path, device, form = sys.argv[1], sys.argv[2] or None, json.loads(sys.argv[3])
blocks, error, stopped = [], None, None
def stop(*_):
    global stopped
    stopped = stopped or time.monotonic()
    microphone.stop()
try:
    with Microphone(device, form=form and tuple(form)) as microphone:
        signal.signal(signal.SIGINT, stop)
        for block in microphone.blocks:
            if not blocks:
                print("recording", flush=True)
                time.sleep(float(sys.argv[4]))
                late = microphone.backlog_s()
            blocks.append(block)
            if stopped is None:
                loudest = max(globals().get("loudest", -1e9), microphone.level_dbfs)
except InputError as exc:
    error = str(exc)
microphone.close()  # more than once
np.save(path, np.concatenate(blocks))
print(json.dumps({
    "error": error, "rate": microphone.sample_rate, "overruns": microphone.overruns,
    "longest": max(map(len, blocks)), "spoken": (stopped or 0) - microphone.started,
    "late": late, "backlog": microphone.backlog_s(), "loudest": loudest,
}))
"""


@pytest.fixture(scope="module")
def microphone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualMicrophone]:
    with virtual_microphone(tmp_path_factory.mktemp("microphone")) as found:
        yield found


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of speech as 16-bit WAV."""
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.round(audio.load(SPEECH).samples[:48000] * 32767).astype("<i2").tobytes())
    return path


def python(code: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def start(
    microphone: VirtualMicrophone,
    path: Path,
    device: str = "",
    form: list[int] | None = None,
    asleep: float = 0.0,
) -> subprocess.Popen[str]:
    """A child that is recording, and lets the first block wait for so many seconds."""
    command = [sys.executable, "-c", RECORD, str(path), device, json.dumps(form), str(asleep)]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, env=microphone.environment, stdout=pipe, stderr=pipe, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "recording\n", child.communicate(timeout=60)[1]
    return child


def finish(child: subprocess.Popen[str]) -> dict[str, Any]:
    out, noise = child.communicate(timeout=60)
    assert child.returncode == 0, noise
    return json.loads(out) | {"stderr": noise}  # type: ignore[no-any-return]


def place(heard: npt.NDArray[np.float32], said: npt.NDArray[np.float32]) -> int:
    """Where `said` fits best."""
    n = 1 << (len(heard) + len(said)).bit_length()
    product = np.fft.irfft(np.fft.rfft(heard, n) * np.conj(np.fft.rfft(said, n)), n)
    return int(product[: len(heard) - len(said) + 1].argmax())


def likeness(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize(("device", "form"), [("", None), ("PUL", None), ("pulse", [44100, 2])])
def test_what_is_said_is_recorded(
    microphone: VirtualMicrophone, clip: Path, tmp_path: Path, device: str, form: list[int] | None
) -> None:
    for _ in range(3):  # a machine too busy to record says so
        child = start(microphone, tmp_path / "heard.npy", device, form)
        microphone.play(clip)
        child.send_signal(signal.SIGINT)
        found = finish(child)
        if not found["overruns"]:
            break
    heard, said = np.load(tmp_path / "heard.npy"), audio.load(clip).samples
    assert (found["error"], found["rate"], found["stderr"]) == (None, 16000, "")
    assert found["overruns"] == 0 and found["backlog"] == 0.0
    assert found["longest"] <= (3200 if form else 1600)  # the resampler gives what it held back in bursts

    at = place(heard, said)
    heard = heard[at : at + len(said)]
    # A sample lost or said twice shifts what follows. So each half second on its own has to be more like what
    # was said there than that is like itself one sample later.
    for i in range(0, len(said) - 8000, 8000):
        shifted = likeness(said[i : i + 8000], said[i + 1 : i + 8001])
        assert likeness(heard[i : i + 8000], said[i : i + 8000]) > shifted
    # At 100 % the sink's factor is 1. A volume of 99 % would be 0.26 dB less, half of a channel 6 dB.
    assert abs(audio.level_dbfs(heard) - audio.level_dbfs(said)) < 0.25
    blocks = [audio.level_dbfs(said[i : i + 1600]) for i in range(len(said) - 1600)][::100]
    assert min(blocks) < found["loudest"] < max(blocks) + 0.25


def test_recorded_time_is_real_time(microphone: VirtualMicrophone, tmp_path: Path) -> None:
    child = start(microphone, tmp_path / "heard.npy", asleep=1.5)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(2.5)
    child.send_signal(signal.SIGINT)
    found = finish(child)
    lost = found["spoken"] - len(np.load(tmp_path / "heard.npy")) / 16000
    # Up to Ctrl-C, or a block more. What is missing was reported, but for a last block that came late.
    assert lost > -0.2
    assert lost < 0.6 or found["overruns"] > 0
    assert (found["late"] > 1.0 and found["backlog"] == 0.0) or found["overruns"] > 0


def test_unplugged(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with virtual_microphone(home) as microphone:
        child = start(microphone, tmp_path / "heard.npy")
        microphone.unplug()
        found = finish(child)
    assert found["error"] == "microphone 'default': no more sound comes from it, was it unplugged?"
    assert found["backlog"] == 0.0 and len(np.load(tmp_path / "heard.npy")) >= 1600


LIST = """
from pocketphi.runtime.capture import devices
for device in devices():
    print(device.name, device.index, device.host, device.is_default)
"""
OPEN = """
import sys
from pocketphi.runtime.capture import Microphone
from pocketphi.runtime.errors import InputError
try:
    Microphone(sys.argv[1] or None)
except InputError as exc:
    print(exc)
"""


def test_devices(microphone: VirtualMicrophone) -> None:
    found = python(LIST, environment=microphone.environment)
    rows = [line.split() for line in found.stdout.splitlines()]
    assert found.stderr == "" and {"pulse", "default"} <= {row[0] for row in rows}
    assert [row[0] for row in rows if row[3] == "True"] == ["default"]


def test_an_unknown_device(microphone: VirtualMicrophone) -> None:
    for name in ("headset", "999"):
        found = python(OPEN, name, environment=microphone.environment)
        assert found.stdout.startswith(f"microphone '{name}': is not there, expected one of: 0: ")
        assert "pulse (ALSA)" in found.stdout and found.stdout.count("\n") == 1 and found.stderr == ""


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are found differently")


@linux
def test_portaudio_that_cannot_be_loaded(tmp_path: Path) -> None:
    """What the loader finds first is no library; where PortAudio is not installed, it finds nothing."""
    (tmp_path / "libportaudio.so.2").write_bytes(b"")
    found = python(OPEN, "", environment=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)})
    assert found.stdout.startswith("microphone: ") and "libportaudio2; Fedora: portaudio" in found.stdout
    assert found.stdout.count("\n") == 1 and found.stderr == ""


@linux
@pytest.mark.skipif(bool(list(Path("/dev/snd").glob("pcm*c"))), reason="this machine has a microphone")
def test_a_machine_without_a_microphone(tmp_path: Path) -> None:
    if not ctypes.util.find_library("portaudio"):
        pytest.skip("needs PortAudio")
    nothing = {"HOME": str(tmp_path), "PULSE_SERVER": "unix:/nowhere"}
    found = python(OPEN, "", environment=os.environ | nothing)
    assert found.stdout == "microphone: this machine has none; --file and --stdin work without one\n"
    assert found.stderr == ""


def device(index: int, name: str, channels: int = 1, rate: int = 48000, default: bool = False) -> Device:
    return Device(index, name, "Core Audio", channels, rate, default)


def test_choosing_a_device() -> None:
    there = [device(0, "Built-in Mic"), device(2, "USB Mic"), device(5, "USB Mic Pro", default=True)]
    assert choose(None, there).index == 5
    assert choose(None, there[:1]).index == 0
    assert choose(2, there).index == choose("2", there).index == 2
    assert choose("built", there).index == 0 and choose("PRO", there).index == 5
    assert choose("usb mic", there).index == 2  # the whole of a name, and a part of another
    with pytest.raises(InputError, match=r"'usb': is the name of several, give a number: 2: USB Mic \(Core"):
        choose("usb", there)
    with pytest.raises(
        InputError, match=r"'1': is not there, expected one of: 0: Built-in Mic \(Core Audio\)"
    ):
        choose(1, there)
    with pytest.raises(InputError, match="this machine has none; --file and --stdin"):
        choose("usb", [])


@pytest.mark.parametrize(
    ("takes", "channels", "want"),
    [
        ({(16000, 1), (48000, 1), (48000, 2)}, 2, (16000, 1)),
        ({(48000, 1), (48000, 2)}, 2, (48000, 1)),
        ({(48000, 2), (48000, 8)}, 8, (48000, 2)),
        ({(48000, 8)}, 8, (48000, 8)),
        (set(), 128, (48000, 64)),  # opening it says why it cannot be
    ],
)
def test_the_form_to_record_in(takes: set[tuple[int, int]], channels: int, want: tuple[int, int]) -> None:
    assert best_form(device(0, "Mic", channels), lambda *form: form in takes) == want
