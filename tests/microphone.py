# SPDX-License-Identifier: Apache-2.0
"""A microphone that hears what the test plays: a sound server of our own, whose sink is its source.

PortAudio reaches it through ALSA's plug-in for PulseAudio. ALSA reads its configuration from the home
directory once in a process, so recording belongs in a child process with `VirtualMicrophone.environment`.
It plays in real time.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

REQUIRED = "POCKETPHI_REQUIRE_MICROPHONE"  # set to 1: where it cannot be had the tests fail
_PACKAGES = "pulseaudio pulseaudio-utils libportaudio2 libasound2-plugins"
_ALSA = "pcm.!default { type pulse }\nctl.!default { type pulse }\n"
_START_S = 30


@dataclass(frozen=True)
class VirtualMicrophone:
    environment: dict[str, str]  # for the processes that record and play
    process: subprocess.Popen[bytes]  # the server

    def play(self, *files: Path) -> None:
        """One after the other; returns when the last has been played. What libsndfile reads, but no MP3."""
        for file in files:
            command = ["paplay", "--device=virt", str(file)]
            subprocess.run(command, env=self.environment, check=True, timeout=600)

    def unplug(self) -> None:
        """The server is gone, without a word."""
        self.process.kill()
        self.process.wait()


def missing() -> str:
    """What this machine lacks, or nothing."""
    programs = [name for name in ("pulseaudio", "pactl", "paplay") if shutil.which(name) is None]
    if not ctypes.util.find_library("portaudio"):
        programs.append("PortAudio")
    if not list(Path("/usr").glob("lib*/**/libasound_module_pcm_pulse.so")):
        programs.append("ALSA's plug-in for PulseAudio")
    return f"needs {', '.join(programs)} (Debian: {_PACKAGES})" if programs else ""


@contextmanager
def virtual_microphone(root: Path) -> Iterator[VirtualMicrophone]:
    """The server, in `root`, an empty folder, for the time of a block. Skips the test where there is none."""
    if why := missing():
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED} is set: {why}")
        pytest.skip(why)
    (root / ".asoundrc").write_text(_ALSA)
    runtime = root / "run"
    runtime.mkdir(mode=0o700)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PULSE_", "ALSA_", "XDG_"))}
    environment = kept | {
        "HOME": str(root),
        "XDG_RUNTIME_DIR": str(runtime),
        "PULSE_SERVER": f"unix:{runtime}/pulse/native",
    }
    command = ["pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", "--use-pid-file=no"]
    command += ["-L", "module-native-protocol-unix", "-L", "module-null-sink sink_name=virt rate=16000"]
    with (root / "pulseaudio.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(server, environment, root / "pulseaudio.log")
        subprocess.run(["pactl", "set-default-source", "virt.monitor"], env=environment, check=True)
        yield VirtualMicrophone(environment, server)
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for(server: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    end = time.monotonic() + _START_S
    while subprocess.run(["pactl", "info"], env=environment, capture_output=True).returncode:
        if server.poll() is not None or time.monotonic() > end:
            pytest.fail(f"PulseAudio does not start: {log.read_text('utf-8', 'replace')[-500:]}")
        time.sleep(0.1)
