# SPDX-License-Identifier: Apache-2.0
"""`transcribe`: what is said in recordings of any length, as it is read."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

from pocketphi.runtime.errors import InputError, OutputError

from .checks import a_path, as_flag, task_of
from .options import (
    Adapter,
    AnyKvType,
    BackboneOption,
    CtxSize,
    GpuLayers,
    ModelDir,
    Predict,
    Provider,
    ProviderOption,
    Seed,
    Temp,
    Threads,
    Verbose,
)
from .values import log_to_stderr, open_model, options_of

if TYPE_CHECKING:
    from pocketphi.runtime.engine import Model
    from pocketphi.runtime.progress import AudioBar
    from pocketphi.runtime.reader import Reader
    from pocketphi.runtime.sampler import Sampling
    from pocketphi.runtime.segments import SegmentRules
    from pocketphi.runtime.speech_task import Task
    from pocketphi.runtime.transcript import TranscriptFormat

_Begin = Literal["new", "resume", "restart"]


def transcribe(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Audio files; - reads WAV or raw s16le from stdin.")],
    model: ModelDir = None,
    file_format: Annotated[str | None, typer.Option("--format", help="txt, srt, vtt, json or jsonl; several with commas, then with -o. [default: txt]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--output", parser=a_path, metavar="<path>", help="Folder for FILE.txt, FILE.srt, …, which grow as FILE.txt.part; default stdout.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With -o: go on where an interrupted run stopped; what is finished is left as it is.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="With -o: begin anew, whatever an earlier run left.")] = False,
    translate: Annotated[str | None, typer.Option("-tr", "--translate", help="A language to translate to.")] = None,
    both: Annotated[bool, typer.Option("--both", help="Transcript and translation in one pass.")] = False,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Words to expect: names and terms.")] = None,
    instruction: Annotated[str | None, typer.Option("--instruction", help="Instead of the model card's own.")] = None,
    pause: Annotated[float, typer.Option("--pause", help="Seconds of silence that end an utterance.")] = 0.7,
    n: Predict = -1, temp: Temp = 0.0, seed: Seed = -1, ctx_size: CtxSize = 0, threads: Threads = None,
    gpu_layers: GpuLayers = 0, cache_type: AnyKvType = None, backbone: BackboneOption = None,
    provider: ProviderOption = Provider.cpu, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Write down what is said in audio files, utterance by utterance. Times are those of the utterances.

    Of several files, one that cannot be used is an error line, and the others are written; the exit code is then
    that of the first error.
    """
    from pocketphi.runtime.files import make_folder
    from pocketphi.runtime.reader import Reader
    from pocketphi.runtime.sampler import Sampling
    from pocketphi.runtime.segments import SegmentRules

    log_to_stderr(verbose)
    formats = _formats(file_format, as_json, out)
    task = task_of(translate, both, prompt, instruction)
    with as_flag("--pause", "pause_s"):
        rules = SegmentRules(pause_s=pause)
    sampling = Sampling(temp, seed=None if seed < 0 else seed)
    options = options_of(n, sampling, Adapter.none)
    begin = _begin(files, out, resume, restart)
    stems = _stems(files, formats, out)
    if out is not None:
        _check_outputs(files, stems, formats, out)
        make_folder(out)
    with open_model(
        model, ctx_size, threads, gpu_layers, cache_type, mode="speech", backbone=backbone, provider=provider
    ) as loaded:
        job = _job(loaded, task, rules, sampling, n)
        work = _Work(Reader(loaded, task, options), rules, formats, job, begin)
        code = _all_of(work, [_Recording(*one) for one in zip(files, stems, strict=True)], out)
    if code:
        raise typer.Exit(code)


def _all_of(work: _Work, recordings: list[_Recording], out: Path | None) -> int:
    """One after the other; with several, one that is bad is a line of its own. Returns the first error's code."""
    code = 0
    for recording in recordings:
        try:
            if out is None:
                _to_stdout(work, recording)
            else:
                _to_files(work, recording, out)
        except (InputError, OutputError) as exc:
            if len(recordings) == 1:
                raise
            typer.echo("error: " + " ".join(str(exc).split()), err=True)
            code = code or exc.exit_code
    return code


def _formats(file_format: str | None, as_json: bool, out: Path | None) -> tuple[TranscriptFormat, ...]:
    """What to write, checked against where it goes."""
    from pocketphi.runtime.transcript import parse_formats

    if as_json and out is not None:
        raise InputError("--json writes to standard output: with -o, give --format json")
    if as_json and file_format not in (None, "json"):
        raise InputError(f"--json and --format {file_format[:40]} are both given, expected one")
    if file_format is None:
        file_format = "json" if as_json else "txt"
    return parse_formats(file_format, to_files=out is not None)


def _begin(files: list[str], out: Path | None, resume: bool, restart: bool) -> _Begin:
    """What to do about an earlier run."""
    if resume and restart:
        raise InputError("--resume and --restart are both given, expected one")
    flag = "--resume" if resume else "--restart"
    if (resume or restart) and out is None:
        raise InputError(f"{flag} is about the files of an earlier run: name their folder with -o")
    if resume and "-" in files:
        raise InputError("--resume reads a recording again: standard input cannot be, give it as a file")
    return "resume" if resume else "restart" if restart else "new"


def _stems(files: list[str], formats: tuple[TranscriptFormat, ...], out: Path | None) -> list[str]:
    """What each file's transcripts are called, without their endings."""
    if files.count("-") > 1:
        raise InputError("- is given twice: standard input can be read once")
    stems = ["stdin" if name == "-" else Path(name).name for name in files]
    if out is None:
        if len(files) > 1 and formats[0] in ("srt", "vtt", "jsonl"):
            raise InputError(
                f"{len(files)} files make {len(files)} {formats[0]} files: name a folder with -o"
            )
    elif len(set(stems)) < len(stems):
        raise InputError("two of the files have the same name: their transcripts would be one")
    return stems


def _check_outputs(
    files: list[str], stems: list[str], formats: tuple[TranscriptFormat, ...], out: Path
) -> None:
    """No transcript replaces a recording, or a model's file."""
    from pocketphi.runtime.files import check_not_model, check_not_read

    check_not_model(out)
    written = {f"{stem}.{one}" for stem in stems for one in formats}
    for path in map(Path, files):
        if path.name in written:
            check_not_read(out / path.name, path)


@dataclass(frozen=True, slots=True)
class _Work:
    """What is done with every recording."""

    reader: Reader
    rules: SegmentRules
    formats: tuple[TranscriptFormat, ...]
    job: Mapping[str, Any]
    begin: _Begin


@dataclass(frozen=True, slots=True)
class _Recording:
    """A file, or standard input."""

    name: str
    stem: str

    @property
    def path(self) -> Path | None:
        return None if self.name == "-" else Path(self.name)

    @property
    def source(self) -> Path | BinaryIO:
        return self.path or sys.stdin.buffer

    def note(self, text: str) -> None:
        """To whoever waits; standard output is the transcript's alone."""
        typer.echo(f"{'standard input' if self.name == '-' else self.name}: {text}", err=True)


def _to_stdout(work: _Work, recording: _Recording) -> None:
    """Utterance by utterance; after Ctrl-C too, what is there is a transcript."""
    from pocketphi.runtime import audio
    from pocketphi.runtime.progress import AudioBar, clock
    from pocketphi.runtime.transcribe import transcribe as utterances
    from pocketphi.runtime.transcript import TranscriptWriter

    writer = TranscriptWriter(work.formats[0])
    head, done_s, anything = writer.begin(), 0.0, False
    with audio.stream(recording.source) as sound, AudioBar() as bar:
        bar.start(sound.seconds, recording.stem)
        try:
            for segment in utterances(work.reader, sound, work.rules, progress=bar.reach):
                _print(head + writer.add(segment), bar)
                head, done_s = "", segment.t1
                anything = anything or bool(segment.text)
        except (KeyboardInterrupt, SystemExit):  # SystemExit: SIGTERM
            _print(head + writer.end(), bar)
            bar.finish()
            how = "" if recording.path is None else "; with -o, --resume could go on from there"
            recording.note(f"interrupted after {clock(done_s)}{how}")
            raise
        _print(head + writer.end(), bar)
    if not anything:
        recording.note("no speech found")


def _to_files(work: _Work, recording: _Recording, folder: Path) -> None:
    """Into parts that grow; the files appear when all is read."""
    from pocketphi.runtime import audio
    from pocketphi.runtime.progress import AudioBar, clock
    from pocketphi.runtime.transcribe import transcribe as utterances
    from pocketphi.runtime.transcript_files import TranscriptFiles, source_of

    path, stem, formats = recording.path, recording.stem, work.formats
    resume = work.begin == "resume"
    with audio.stream(recording.source) as sound, AudioBar() as bar:
        job = None if path is None else {**source_of(path), **work.job}
        if job is not None and work.begin != "restart" and _is_done(work, recording, folder, job):
            recording.note(f"its transcripts are in {folder}: left as they are")
            return
        with TranscriptFiles(folder, stem, formats, journal=job, resume=resume) as files:
            since_s = files.done_until_s
            if resume:
                recording.note(
                    f"goes on at {clock(since_s)}" if files.resumed else "nothing to resume, begun"
                )
            bar.start(sound.seconds, stem, before_s=since_s)
            try:
                for segment in utterances(
                    work.reader, sound, work.rules, done_until_s=since_s, progress=bar.reach
                ):
                    files.add(segment)
            except (KeyboardInterrupt, SystemExit):
                bar.finish()
                how = "" if path is None else "; the same command with --resume goes on from there"
                parts = ", ".join(map(str, files.parts))
                recording.note(f"interrupted after {clock(files.done_until_s)}, kept in {parts}{how}")
                raise
            files.finish()
    if not any(segment.text for segment in files.segments):
        recording.note("no speech found")


def _is_done(work: _Work, recording: _Recording, folder: Path, job: Mapping[str, Any]) -> bool:
    """Whether an earlier run has done it all. One that was interrupted is not thrown away unasked."""
    from pocketphi.runtime.progress import clock
    from pocketphi.runtime.transcript_files import interrupted_s, is_finished

    try:
        reached_s = interrupted_s(folder, recording.stem, job)
        if work.begin == "resume":
            return is_finished(folder, recording.stem, work.formats, job)
    except InputError as exc:
        raise InputError(f"{exc}; --restart begins anew") from None
    if reached_s is not None:
        raise InputError(
            f"{recording.name}: was interrupted after {clock(reached_s)}: --resume goes on, --restart begins anew"
        )
    return False


def _print(text: str, bar: AudioBar) -> None:
    """To stdout, at once; on a terminal without the bar in between."""
    if not text:
        return
    if sys.stdout.isatty():
        with bar.aside():
            typer.echo(text, nl=False)
    else:
        typer.echo(text, nl=False)


def _job(model: Model, task: Task, rules: SegmentRules, sampling: Sampling, n: int) -> dict[str, Any]:
    """All that a transcript depends on, but the recording: to resume, each must be what it was."""
    return {
        "model": model.bundle.name,
        "recipe": model.bundle.recipe,
        "model_sha256": hashlib.sha256(model.bundle.to_json().encode("utf-8")).hexdigest(),
        "instruction": task.text,
        "both": task.both,
        **asdict(rules),
        "max_tokens": n,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "cache_type": model.engine["kv_type"],
        "backbone": model.engine["backbone"],
        "provider": model.engine["provider"],
    }
