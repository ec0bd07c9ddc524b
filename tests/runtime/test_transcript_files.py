# SPDX-License-Identifier: Apache-2.0
"""Transcripts that grow: kill the writer anywhere and go on; a damaged or foreign journal is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pocketphi.runtime.errors import InputError, InUseError, OutputError
from pocketphi.runtime.transcript import TRANSCRIPT_FORMATS, Segment, TranscriptFormat, write
from pocketphi.runtime.transcript_files import TranscriptFiles, check_places, interrupted_s, is_finished

JOB = {"source": "talk.flac", "sha256": "ab", "pause_s": 0.7, "words": None, "languages": ("a", "b")}
SEGMENTS = [
    Segment(0.1, 2.2000000001, "One."),
    Segment(2.5, 3.0, "Two…", "Deux"),
    Segment(3.0, 4 / 3 + 2, 'Three "3"'),
]


def open_files(
    folder: Path,
    *,
    formats: tuple[TranscriptFormat, ...] = TRANSCRIPT_FORMATS,
    resume: bool = False,
    **job: Any,
) -> TranscriptFiles:
    return TranscriptFiles(folder, "talk", formats, journal=JOB | job, resume=resume)


def begun(folder: Path, n: int = 2) -> Path:
    """A journal of `n` segments, left as a killed process leaves it."""
    with open_files(folder) as files:
        for segment in SEGMENTS[:n]:
            files.add(segment)
    return folder / "talk.part.jsonl"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


def test_parts_grow_and_become_the_files(tmp_path: Path) -> None:
    (tmp_path / "talk.srt").write_text("of an earlier run", "utf-8")
    with open_files(tmp_path) as files:
        for n, segment in enumerate(SEGMENTS, 1):
            files.add(segment)
            for file_format in ("txt", "srt", "vtt", "jsonl"):
                part = tmp_path / f"talk.{file_format}.part"
                assert text_of(part) == write(SEGMENTS[:n], file_format)
        assert text_of(tmp_path / "talk.srt") == "of an earlier run"
        files.finish()
    assert names(tmp_path) == sorted([".talk.done", *(f"talk.{f}" for f in TRANSCRIPT_FORMATS)])
    for file_format in TRANSCRIPT_FORMATS:
        assert text_of(tmp_path / f"talk.{file_format}") == write(SEGMENTS, file_format)


def test_nothing_said_is_an_empty_transcript(tmp_path: Path) -> None:
    with open_files(tmp_path) as files:
        files.finish()
    assert text_of(tmp_path / "talk.vtt") == "WEBVTT\n"
    assert json.loads(text_of(tmp_path / "talk.json")) == {"text": "", "segments": []}


def test_without_a_job_there_is_no_journal_but_for_json(tmp_path: Path) -> None:
    for formats, parts in ((("srt",), ["talk.srt.part"]), (("json",), ["talk.part.jsonl"])):
        with TranscriptFiles(tmp_path, "talk", formats, journal=None) as files:  # type: ignore[arg-type]
            files.add(SEGMENTS[0])
            assert [p.name for p in files.parts] == names(tmp_path) == parts
            files.finish()
        assert names(tmp_path) == [f"talk.{formats[0]}"]
        (tmp_path / f"talk.{formats[0]}").unlink()


WRITER = """
import sys
from pathlib import Path
from pocketphi.runtime.transcript import Segment
from pocketphi.runtime.transcript_files import TranscriptFiles
files = TranscriptFiles(Path(sys.argv[1]), "talk", ("txt", "srt"), journal={"source": "talk.flac"})
i = 0
while True:
    files.add(Segment(i, i + 1, f"word {i}"))
    i += 1
    if i == 50:
        print("50", flush=True)
"""


def test_a_killed_process_loses_no_segment(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"50\n"
        child.kill()
        assert child.wait(timeout=30) == -signal.SIGKILL
    before = text_of(tmp_path / "talk.txt.part").splitlines()
    assert before[:50] == [f"word {i}" for i in range(50)]
    journal: dict[str, Any] = {"source": "talk.flac"}
    with TranscriptFiles(tmp_path, "talk", ("txt", "srt"), journal=journal, resume=True) as files:
        done = list(files.segments)
        assert files.resumed
        assert done == [Segment(i, i + 1, f"word {i}") for i in range(len(done))]
        assert len(done) >= len(before) - 1 >= 49, "the last line of a part may be half written"
        files.add(Segment(len(done), len(done) + 1, "the end"))
        files.finish()
    assert text_of(tmp_path / "talk.srt") == write(
        [*done, Segment(len(done), len(done) + 1, "the end")], "srt"
    )


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_half_a_line_at_the_end_is_ignored(cut: int, tmp_path: Path) -> None:
    journal = begun(tmp_path)
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-cut])
    with open_files(tmp_path, resume=True) as files:
        assert files.segments == SEGMENTS[:1]
        assert files.done_until_s == SEGMENTS[0].t1
        for segment in SEGMENTS[1:]:
            files.add(segment)
        assert text_of(journal).count("\n") == 1 + len(SEGMENTS)
        files.finish()
    assert text_of(tmp_path / "talk.vtt") == write(SEGMENTS, "vtt")


@pytest.mark.parametrize("left", [None, b"", b'{"format": "pocketphi tr'])
def test_without_a_journal_the_job_begins(left: bytes | None, tmp_path: Path) -> None:
    if left is not None:
        (tmp_path / "talk.part.jsonl").write_bytes(left)
    with open_files(tmp_path, resume=True) as files:
        assert (files.resumed, files.segments, files.done_until_s) == (False, [], 0.0)
        files.add(SEGMENTS[0])
    with open_files(tmp_path, resume=True) as files:
        assert (files.resumed, files.segments) == (True, SEGMENTS[:1])


def test_without_resume_a_job_begins_anew(tmp_path: Path) -> None:
    begun(tmp_path)
    with open_files(tmp_path) as files:
        assert files.segments == []
        assert text_of(tmp_path / "talk.txt.part") == ""


def test_going_on_in_other_formats(tmp_path: Path) -> None:
    """The parts are made from the journal, so the formats may change."""
    with open_files(tmp_path, formats=("txt",)) as files:
        files.add(SEGMENTS[0])
    with open_files(tmp_path, formats=("vtt",), resume=True) as files:
        assert text_of(tmp_path / "talk.vtt.part") == write(SEGMENTS[:1], "vtt")


@pytest.mark.parametrize(
    ("job", "want"),
    [
        ({"sha256": "cd"}, '\'sha256\' is "ab", expected "cd"'),
        ({"pause_s": 0.5, "words": "x"}, "'pause_s' is 0.7, expected 0.5"),
        ({"words": "Zürich"}, "'words' is null, expected"),
        ({"new": 1}, "'new' is not given, expected 1"),
        ({"languages": ["a"]}, "'languages' is"),
    ],
)
def test_another_job_is_not_gone_on_with(job: dict[str, Any], want: str, tmp_path: Path) -> None:
    journal = begun(tmp_path)
    before = journal.read_bytes()
    with pytest.raises(InputError) as caught:
        open_files(tmp_path, resume=True, **job)
    assert want in str(caught.value)
    assert "\n" not in str(caught.value)
    assert journal.read_bytes() == before


GOOD = b'{"t0": 5, "t1": 6, "text": "x", "translation": null}'
DAMAGED = [
    (b"nonsense", "line 4: is not JSON"),
    (b"\xff\xfe", "line 4: is not JSON"),
    (b"[" * 200_000, "line 4: is not JSON"),
    (b"9" * 10_000, "line 4"),
    (b"x" * 2_000_000, "bytes long"),
    (b"[]", "is a JSON list"),
    (b"null", "is a JSON NoneType"),
    (b"{}", "expected ['t0'"),
    (GOOD.replace(b"}", b', "more": 1}'), "expected ['t0'"),
    (GOOD.replace(b"5", b"NaN"), "t0 is nan"),
    (GOOD.replace(b"6", b"Infinity"), "t1 is inf"),
    (GOOD.replace(b"6", b"1e400"), "t1 is inf"),
    (GOOD.replace(b"6", b"9" * 400), "t1 is"),
    (GOOD.replace(b"5", b'"5"'), "t0 is '5'"),
    (GOOD.replace(b"5", b"true"), "t0 is 'True'"),
    (GOOD.replace(b"5", b"-1"), "t0 is"),
    (GOOD.replace(b"5", b"2.9"), "from 3 on"),
    (GOOD.replace(b"6", b"4"), "t1 is"),
    (GOOD.replace(b'"x"', b"7"), "not both text"),
    (GOOD.replace(b"null", b"[]"), "not both text"),
    (GOOD.replace(b'"x"', b'"\\ud800"'), "not both text"),
]


@pytest.mark.parametrize(("line", "want"), DAMAGED, ids=lambda v: str(v)[:30])
def test_a_damaged_journal_is_one_line(line: bytes, want: str, tmp_path: Path) -> None:
    journal = begun(tmp_path)
    damaged = journal.read_bytes() + line + b"\n"
    journal.write_bytes(damaged)
    with pytest.raises(InputError) as caught:
        open_files(tmp_path, resume=True)
    assert want in str(caught.value)
    assert str(journal) in str(caught.value)
    assert len(str(caught.value)) < len(str(journal)) + 500
    assert "\n" not in str(caught.value)
    assert journal.read_bytes() == damaged


def test_a_line_like_the_damaged_ones_is_read_when_it_is_right(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    journal.write_bytes(journal.read_bytes() + GOOD + b"\n")
    with open_files(tmp_path, resume=True) as files:
        assert files.segments[-1] == Segment(5.0, 6.0, "x")


@pytest.mark.parametrize("first", [b"{}", b"[]", b'{"format": "pocketphi transcript journal", "version": 2}'])
def test_something_else_under_the_name_of_a_journal(first: bytes, tmp_path: Path) -> None:
    (tmp_path / "talk.part.jsonl").write_bytes(first + b"\n")
    with pytest.raises(InputError, match=r"talk\.part\.jsonl"):
        open_files(tmp_path, resume=True)


def test_a_huge_journal_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "talk.part.jsonl").open("wb") as file:
        file.truncate(1 << 30)  # a hole
    with pytest.raises(InputError, match="bytes long"):
        open_files(tmp_path, resume=True)


def test_a_folder_that_is_gone_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"talk\.part\.jsonl"):
        open_files(tmp_path / "gone")


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "talk.srt").mkdir()
    with open_files(tmp_path, formats=("srt",)) as files:
        files.add(SEGMENTS[0])
        with pytest.raises(OutputError, match=r"talk\.srt"):
            files.finish()
    assert text_of(tmp_path / "talk.srt.part") == write(SEGMENTS[:1], "srt")
    with open_files(tmp_path, formats=("srt",), resume=True) as files:
        assert files.segments == SEGMENTS[:1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_or_a_link_under_the_name_of_a_part_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "talk.txt.part")
    (tmp_path / "precious").write_text("kept", "utf-8")
    (tmp_path / "talk.srt.part").symlink_to(tmp_path / "precious")
    with open_files(tmp_path) as files:
        files.add(SEGMENTS[0])
        files.finish()
    assert text_of(tmp_path / "talk.txt") == "One.\n"
    assert text_of(tmp_path / "precious") == "kept"


FULL = """
import resource, sys
from pathlib import Path
from pocketphi.runtime.errors import OutputError
from pocketphi.runtime.transcript import Segment
from pocketphi.runtime.transcript_files import TranscriptFiles
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
files = TranscriptFiles(Path(sys.argv[1]), "talk", ("srt",), journal={"source": "talk.flac"})
try:
    for i in range(1000):
        files.add(Segment(i, i + 1, "a word that is said"))
except OutputError as exc:
    print(i, exc)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes there")
def test_a_full_disk_leaves_whole_segments(tmp_path: Path) -> None:
    """The journal is the first to reach the limit: none of the refused segment is in any file."""
    said = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    n, _, message = said.stdout.partition(" ")
    assert "cannot be written" in message
    assert message.count("\n") == 1
    segments = [Segment(i, i + 1, "a word that is said") for i in range(int(n))]
    assert len(segments) > 9
    assert text_of(tmp_path / "talk.srt.part") == write(segments, "srt")
    with TranscriptFiles(tmp_path, "talk", ("srt",), journal={"source": "talk.flac"}, resume=True) as files:
        assert files.segments == segments


WAITER = """
import sys, time
from pathlib import Path
from pocketphi.runtime.transcript import Segment
from pocketphi.runtime.transcript_files import TranscriptFiles
journal = {"source": "talk.flac"} if sys.argv[2] == "journal" else None
files = TranscriptFiles(Path(sys.argv[1]), "talk", ("txt",), journal=journal)
files.add(Segment(0, 1, "One."))
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the system keeps open files there")
@pytest.mark.parametrize("kind", ["journal", "part alone"])
def test_one_process_writes_at_a_time(kind: str, tmp_path: Path) -> None:
    """The second is refused and changes nothing; when the first is killed, the next one begins."""
    job = {"source": "talk.flac"} if kind == "journal" else None
    child = [sys.executable, "-c", WAITER, str(tmp_path), kind]
    with subprocess.Popen(child, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"begun\n"
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        for resume in (False, True):
            with pytest.raises(InUseError, match="is being written by another process"):
                TranscriptFiles(tmp_path, "talk", ("txt",), journal=job, resume=resume)
        with pytest.raises(InUseError):
            check_places(tmp_path, "talk", ("txt",))
        if job is not None:
            with pytest.raises(InUseError):
                interrupted_s(tmp_path, "talk", job)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
        first.kill()
        first.wait(timeout=30)
    with TranscriptFiles(tmp_path, "talk", ("txt",), journal=job) as files:
        files.finish()
    assert text_of(tmp_path / "talk.txt") == ""


def test_a_journal_of_somebody_else_stays(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    before = journal.read_bytes()
    with TranscriptFiles(tmp_path, "talk", ("txt",), journal=None) as files:
        files.finish()
    assert journal.read_bytes() == before


def test_how_far_an_interrupted_job_came(tmp_path: Path) -> None:
    assert interrupted_s(tmp_path, "talk", JOB) is None
    begun(tmp_path, 0)
    assert interrupted_s(tmp_path, "talk", JOB) is None
    begun(tmp_path)
    assert interrupted_s(tmp_path, "talk", JOB) == SEGMENTS[1].t1
    with pytest.raises(InputError, match=r"'pause_s' is 0\.7, expected 0\.5"):
        interrupted_s(tmp_path, "talk", JOB | {"pause_s": 0.5})


def test_what_is_finished_is_known_by_its_job(tmp_path: Path) -> None:
    def finish(*formats: TranscriptFormat, **job: Any) -> None:
        with open_files(tmp_path, formats=formats, **job) as files:
            files.finish()

    assert not is_finished(tmp_path, "talk", ("txt",), JOB)
    finish("txt")
    assert is_finished(tmp_path, "talk", ("txt",), JOB)
    assert not is_finished(tmp_path, "talk", ("txt", "srt"), JOB)
    with pytest.raises(InputError, match=r"'pause_s' is 0\.7, expected 0\.5"):
        is_finished(tmp_path, "talk", ("txt",), JOB | {"pause_s": 0.5})
    finish("srt")
    assert is_finished(tmp_path, "talk", ("txt", "srt"), JOB)
    finish("srt", pause_s=0.5)
    other = JOB | {"pause_s": 0.5}
    assert is_finished(tmp_path, "talk", ("srt",), other)
    assert not is_finished(tmp_path, "talk", ("srt", "txt"), other), "talk.txt is of the job before"
    (tmp_path / ".talk.done").unlink()
    assert not is_finished(tmp_path, "talk", ("srt",), other), "nobody knows of which job it is"


def test_places_are_checked_before_any_work(tmp_path: Path) -> None:
    check_places(tmp_path, "talk", ("txt",))
    (tmp_path / "talk.srt").mkdir()
    with pytest.raises(OutputError, match=r"talk\.srt.*is a directory"):
        check_places(tmp_path, "talk", ("txt", "srt"))
    with pytest.raises(OutputError):
        check_places(tmp_path / "gone", "talk", ("txt",))
