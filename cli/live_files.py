# SPDX-License-Identifier: Apache-2.0
"""Where a live session is written: its transcripts and its sound, in files of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from pocketphi.runtime.errors import InUseError, OutputError

if TYPE_CHECKING:
    from pocketphi.runtime.transcript import TranscriptFormat
    from pocketphi.runtime.transcript_files import TranscriptFiles


def check_outputs(
    out: Path | None, file: Path | None, formats: Sequence[TranscriptFormat], save_audio: Path | None
) -> None:
    """Find out what cannot be written before a model is loaded for it."""
    from pocketphi.runtime.files import check_not_model
    from pocketphi.runtime.sources import check_recording
    from pocketphi.runtime.transcript_files import check_places

    if save_audio is not None:
        check_recording(save_audio, file)
        check_not_model(save_audio.parent)
    if out is not None:
        check_not_model(out)
        check_places(out, _stem(file), formats)


def _stem(file: Path | None) -> str:
    """What transcripts are called; never what `transcribe` calls them."""
    return datetime.now().strftime("live-%Y%m%d-%H%M%S") if file is None else f"{file.name}.live"


@contextmanager
def live_files(
    out: Path | None, file: Path | None, formats: Sequence[TranscriptFormat]
) -> Iterator[TranscriptFiles | None]:
    """Transcripts that are complete whenever the session was not broken off."""
    if out is None:
        yield None
        return
    with _open_files(out, file, formats) as files:  # Ctrl-C twice: the parts stay
        try:
            yield files
        except Exception:  # a device that is gone, a reader that has left: what was heard is still whole
            with contextlib.suppress(OutputError):
                files.finish()
            raise
        files.finish()


def _open_files(out: Path, file: Path | None, formats: Sequence[TranscriptFormat]) -> TranscriptFiles:
    """Under the session's name; a session of the same second has another."""
    from pocketphi.runtime.transcript_files import TranscriptFiles

    stem = _stem(file)
    names = chain([stem], (f"{stem}-{n}" for n in count(2)))
    while True:
        name = next(names)
        if file is None and any(out.glob(f"{name}.*")):
            continue
        try:
            return TranscriptFiles(out, name, formats, journal=None)
        except InUseError:
            if file is not None:
                raise
