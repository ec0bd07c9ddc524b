# SPDX-License-Identifier: Apache-2.0
"""`live`: what is said, written down while it is said."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from pocketphi.runtime.errors import InputError, PocketPhiError

from .checks import a_path, as_flag, task_of
from .live_files import check_outputs, live_files
from .options import (
    AnyKvType,
    BackboneOption,
    CtxSize,
    Device,
    GpuLayers,
    ModelDir,
    Provider,
    ProviderOption,
    Threads,
    Verbose,
)
from .values import log_to_stderr, open_model, to_json

if TYPE_CHECKING:
    from pocketphi.runtime.engine import Model
    from pocketphi.runtime.live import Listener, LiveOptions
    from pocketphi.runtime.live_events import LiveEvent
    from pocketphi.runtime.live_view import LiveView
    from pocketphi.runtime.sources import Source
    from pocketphi.runtime.speech_task import Task
    from pocketphi.runtime.transcript_files import TranscriptFiles

_log = logging.getLogger(__name__)
_SELFTEST_MINUTES = 10.0
_WARM_UP_S = 1.0


def live(
    model: ModelDir = None,
    device: Device = None,
    list_devices: Annotated[bool, typer.Option("--list-devices", help="Print the microphones and leave.")] = False,
    stdin: Annotated[bool, typer.Option("--stdin", help="Listen to standard input: WAV, or raw s16le at 16 kHz.")] = False,
    file: Annotated[Path | None, typer.Option("--file", parser=a_path, metavar="<path>", help="Listen to a file, as fast as it can be read.")] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="With --file: at the pace of a microphone.")] = False,
    selftest: Annotated[bool, typer.Option("--selftest", help="Listen to a session whose words are known.")] = False,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Of the self-test [default: 10].")] = None,
    step: Annotated[float, typer.Option("--step", help="Seconds from one reading to the next; it grows where needed.")] = 1.0,
    pause: Annotated[float, typer.Option("--pause", help="Seconds of silence that end an utterance.")] = 0.7,
    translate: Annotated[str | None, typer.Option("-tr", "--translate", help="A language to translate to.")] = None,
    both: Annotated[bool, typer.Option("--both", help="Transcript and translation in one pass.")] = False,
    words: Annotated[str | None, typer.Option("--prompt", help="Words to expect: names, terms.")] = None,
    instruction: Annotated[str | None, typer.Option("--instruction", help="Instead of the model card's own.")] = None,
    file_format: Annotated[str | None, typer.Option("--format", help="Files to write: txt, srt, vtt, json, jsonl, with commas [default: txt].")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--output", parser=a_path, metavar="<path>", help="Folder for live-DATE-TIME.txt, …, or FILE.live.txt, ….")] = None,
    save_audio: Annotated[Path | None, typer.Option("--save-audio", parser=a_path, metavar="<path>", help="Keep what was heard as a WAV file, which grows as FILE.part.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every event as one line of JSON, a summary last.")] = False,
    ctx_size: CtxSize = 0, threads: Threads = None, gpu_layers: GpuLayers = 0, cache_type: AnyKvType = None,
    backbone: BackboneOption = None, provider: ProviderOption = Provider.cpu, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Write down what is said, while it is said. Ctrl-C ends it: what was heard by then is read to its end."""
    from pocketphi.runtime.clock import RealClock
    from pocketphi.runtime.files import make_folder
    from pocketphi.runtime.live import Listener, LiveOptions
    from pocketphi.runtime.reader import Reader
    from pocketphi.runtime.segments import SegmentRules
    from pocketphi.runtime.transcript import parse_formats

    log_to_stderr(verbose)
    if list_devices:
        _print_devices(as_json)
        return
    _check_source(device, stdin, file, realtime, selftest, minutes)
    with as_flag("--pause", "pause_s"):
        rules = SegmentRules(pause_s=pause)
    with as_flag("--step", "step"):
        options = LiveOptions(step, rules)
    task = task_of(translate, both, words, instruction)
    if selftest and (
        task != task_of(None, False, None, None)
        or file_format is not None
        or out is not None
        or save_audio is not None
    ):
        raise InputError(
            "--selftest transcribes what it plays: no file, instruction or translation goes with it"
        )
    if file_format is not None and out is None:
        raise InputError("--format is about files: name a folder for them with -o")
    formats = parse_formats("txt" if file_format is None else file_format, to_files=True)
    if out is not None:
        make_folder(out)
    check_outputs(out, file, formats, save_audio)
    typer.echo("loading the model…", err=True)
    with open_model(
        model, ctx_size, threads, gpu_layers, cache_type, mode="speech", backbone=backbone, provider=provider
    ) as loaded:
        _warm_up(loaded, task)
        if selftest:
            _selftest(loaded, task, options, minutes or _SELFTEST_MINUTES, as_json)
            return
        with (
            _source(device, stdin, file, realtime, save_audio) as source,
            live_files(out, file, formats) as files,
        ):
            listener = Listener(Reader(loaded, task, {}), source, options, RealClock())
            muted = not (stdin or file or verbose)
            stopped_by = _listen(
                listener, source, files, as_json=as_json, muted=muted, paced=file is None or realtime
            )
    if stopped_by == signal.SIGTERM:
        raise typer.Exit(143)


def _check_source(
    device: str | None, stdin: bool, file: Path | None, realtime: bool, selftest: bool, minutes: float | None
) -> None:
    given = {
        "--device": device is not None,
        "--stdin": stdin,
        "--file": file is not None,
        "--selftest": selftest,
    }
    chosen = [name for name, is_given in given.items() if is_given]
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} are given, expected one thing to listen to")
    if realtime and file is None:
        raise InputError("--realtime is about --file: everything else comes at its own pace")
    if minutes is not None and not selftest:
        raise InputError("--minutes is about --selftest")
    if minutes is not None and not 0.1 <= minutes <= 600:  # false for NaN too
        raise InputError(f"--minutes is {minutes:g}, expected 0.1 to 600")
    if file is not None:
        from pocketphi.runtime.files import check_file

        check_file(file)
    elif stdin:
        if sys.stdin.isatty():
            raise InputError("--stdin: standard input is a terminal, expected a pipe or a file")
    elif not selftest:
        check_microphone(device)


def check_microphone(device: str | None) -> None:
    """Find out that there is none before a model is loaded for it."""
    from pocketphi.runtime.capture import choose, devices

    choose(device, devices())


def _print_devices(as_json: bool) -> None:
    from pocketphi.runtime import capture

    found = capture.devices()
    if as_json:
        typer.echo(to_json([asdict(one) for one in found]))
        return
    for one in found:
        mark = "*" if one.is_default else " "
        typer.echo(
            f"{mark} {one.index:3}  {one.name}  ({one.host}, {one.channels} channels, {one.sample_rate} Hz)"
        )
    if not found:
        typer.echo("there is no microphone", err=True)


def _warm_up(model: Model, task: Task) -> None:
    """One throw-away reading of silence: encoder and adapter load now, so that the first words are not late."""
    import numpy as np

    from pocketphi.runtime.audio import SAMPLE_RATE
    from pocketphi.runtime.growing_speech import GrowingSpeech
    from pocketphi.runtime.reader import Reader

    speech = GrowingSpeech(SAMPLE_RATE)
    speech.set_window(np.zeros(int(_WARM_UP_S * SAMPLE_RATE), np.float32))
    Reader(model, task, {"max_tokens": 1}).read(speech)


@contextmanager
def _source(
    device: str | None, stdin: bool, file: Path | None, realtime: bool, save_audio: Path | None
) -> Iterator[Source]:
    """What is listened to, recorded on the way if asked for."""
    from pocketphi.runtime import audio
    from pocketphi.runtime.clock import RealClock
    from pocketphi.runtime.pipe import Piped
    from pocketphi.runtime.sources import Paced, recorded

    with contextlib.ExitStack() as stack:
        source: Source
        if stdin:
            source = Piped(sys.stdin.buffer, RealClock())
        elif file is not None:
            source = Paced(stack.enter_context(audio.stream(file)), RealClock(), pace=realtime)
        else:
            from pocketphi.runtime.capture import Microphone

            source = Microphone(device, RealClock())
        stack.enter_context(source)
        yield source if save_audio is None else stack.enter_context(recorded(source, save_audio))


def _listen(
    listener: Listener,
    source: Source,
    files: TranscriptFiles | None,
    *,
    as_json: bool,
    muted: bool,
    paced: bool,
) -> int | None:
    """The session. Returns the signal that ended it, if one did."""
    from pocketphi.runtime.live_view import LiveView
    from pocketphi.runtime.transcript import Segment

    typer.echo(f"listening to {source.name}: Ctrl-C ends", err=True)
    with _signals(listener.stop) as received:
        try:
            with (
                _stderr(muted) as err,
                LiveView(source, listener, out=sys.stdout, err=err, as_json=as_json) as view,
                _log_through(view),
            ):
                for event in listener:
                    view.show(event)
                    if files is not None and event.type == "final":
                        files.add(Segment(event.t0, event.t1, event.text, event.translation))
        except PocketPhiError:
            _report(listener, as_json, paced)  # of what was heard until then
            raise
        _report(listener, as_json, paced)
    return received[0] if received else None


@contextmanager
def _stderr(muted: bool) -> Iterator[TextIO]:
    """stderr for us alone: what C libraries write there, such as ALSA when a device is gone, is logged after."""
    if not muted:
        yield sys.stderr
        return
    from pocketphi.runtime.stderr_capture import captured_stderr

    sys.stderr.flush()
    encoding = sys.stderr.encoding
    with os.fdopen(os.dup(2), "w", encoding=encoding, errors="replace") as ours, captured_stderr() as said:
        yield ours
    for line in said.text.splitlines():
        _log.debug("%s", line)


def _report(listener: Listener, as_json: bool, paced: bool = True) -> None:
    """The summary; delays mean nothing where the audio does not come at a pace."""
    from pocketphi.runtime.live_view import json_line

    if as_json:
        typer.echo(json_line(listener.summary.to_object()))
        return
    for line in listener.summary.lines(paced=paced):
        typer.echo(line, err=True)


def _selftest(model: Model, task: Task, options: LiveOptions, minutes: float, as_json: bool) -> None:
    """A session made of the evaluation clips that ship with phi4-nano."""
    from pocketphi.convert.builtin import builtin_checkpoint
    from pocketphi.runtime.live_view import json_line
    from pocketphi.runtime.reader import Reader
    from pocketphi.runtime.selftest import SelfTest, script

    folder = builtin_checkpoint().parent / "eval"
    test = SelfTest(Reader(model, task, {}), script(folder, 60 * minutes), options)
    _show_all(test, as_json)
    figures = test.figures()
    if as_json:
        typer.echo(json_line(figures))
        return
    _report(test.listener, as_json)
    for name in (
        "clips",
        "wer",
        "offline_wer",
        "finals_unlike_offline",
        "committed_word_changes",
        "dropped_samples",
    ):
        typer.echo(f"{name} {figures[name]}", err=True)


def _show_all(events: Iterable[LiveEvent], as_json: bool) -> None:
    """Events of a session without a meter: its time skips."""
    from pocketphi.runtime.live_view import json_line, printable

    for event in events:
        if as_json:
            sys.stdout.write(json_line(event.to_object()) + "\n")
        elif event.type == "final" and event.text.strip():
            sys.stdout.write(printable(event.text) + "\n")
        sys.stdout.flush()


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM call `stop`; a second one ends the program at once. Gives the signals received."""
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(143)
        stop()

    before = [(number, signal.signal(number, on_signal)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield received
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class _Above:
    """A stream whose lines appear above the view's region."""

    def __init__(self, view: LiveView) -> None:
        self._view = view

    def write(self, text: str) -> None:
        self._view.say(text)

    def flush(self) -> None:
        """Every line is written at once."""


@contextmanager
def _log_through(view: LiveView) -> Iterator[None]:
    """What is logged meanwhile does not tear the region."""
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
    before = [(handler, handler.setStream(_Above(view))) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in before:
            if stream is not None:
                handler.setStream(stream)
