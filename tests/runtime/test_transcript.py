# SPDX-License-Identifier: Apache-2.0
"""Transcripts, down to the character."""

from __future__ import annotations

import json

import pytest

from pocketphi.runtime.errors import InputError
from pocketphi.runtime.transcript import (
    TRANSCRIPT_FORMATS,
    Segment,
    TranscriptFormat,
    TranscriptWriter,
    parse_formats,
    write,
)

SEGMENTS = [Segment(0.0, 12.3456, "Hello there."), Segment(12.3456, 3725.0, "A <b> & c --> d", "Un <b>")]


def test_txt() -> None:
    assert write(SEGMENTS, "txt") == "Hello there.\nA <b> & c --> d\nUn <b>\n"
    assert write([], "txt") == ""


def test_srt() -> None:
    assert write(SEGMENTS, "srt") == (
        "1\n00:00:00,000 --> 00:00:12,346\nHello there.\n\n"
        "2\n00:00:12,346 --> 01:02:05,000\nA <b> & c → d\nUn <b>\n"
    )


def test_vtt() -> None:
    assert write(SEGMENTS, "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:12.346\nHello there.\n\n"
        "00:00:12.346 --> 01:02:05.000\nA &lt;b&gt; &amp; c --&gt; d\nUn &lt;b&gt;\n"
    )
    assert write([], "vtt") == "WEBVTT\n"


def test_json() -> None:
    found = json.loads(write(SEGMENTS, "json"))
    assert found["text"] == "Hello there.\nA <b> & c --> d"
    assert found["segments"][1] == {
        "t0": 12.3456,
        "t1": 3725.0,
        "text": "A <b> & c --> d",
        "translation": "Un <b>",
    }


def test_json_lines_are_the_segments_of_json() -> None:
    lines = write([*SEGMENTS, Segment(3725.0, 3726.0, "two\nlines")], "jsonl").splitlines()
    assert [json.loads(line) for line in lines[:2]] == json.loads(write(SEGMENTS, "json"))["segments"]
    assert json.loads(lines[2])["text"] == "two\nlines"
    assert write([], "jsonl") == ""


@pytest.mark.parametrize("file_format", ["txt", "srt", "vtt", "jsonl"])
def test_every_beginning_is_a_transcript(file_format: TranscriptFormat) -> None:
    """What is given out after each segment is the whole transcript of the segments so far."""
    segments = [Segment(0, 1, ""), *SEGMENTS, Segment(4000, 4001, " \n "), Segment(4001, 4002, "a\r\nb")]
    writer = TranscriptWriter(file_format)
    text = writer.begin()
    assert text == write([], file_format)
    for n, segment in enumerate(segments, 1):
        text += writer.add(segment)
        assert text == write(segments[:n], file_format)
    assert writer.end() == ""


def test_a_json_transcript_comes_at_the_end() -> None:
    writer = TranscriptWriter("json")
    assert [writer.begin(), *map(writer.add, SEGMENTS)] == ["", "", ""]
    assert writer.end() == write(SEGMENTS, "json")


def test_an_empty_line_in_the_words_does_not_end_a_cue() -> None:
    assert (
        write([Segment(0, 1, "a\n\n1\n00:00 --> x")], "srt")
        == "1\n00:00:00,000 --> 00:00:01,000\na\n1\n00:00 → x\n"
    )
    assert write([Segment(0, 1, "a\r\n\r\nb")], "srt") == "1\n00:00:00,000 --> 00:00:01,000\na\nb\n"
    assert write([Segment(0, 1, "")], "srt") == ""


def test_cues_are_counted_without_those_that_say_nothing() -> None:
    text = write([Segment(0, 1, "a"), Segment(1, 2, ""), Segment(2, 3, "b")], "srt")
    assert [line for line in text.splitlines() if line.isdigit()] == ["1", "2"]


def test_formats_from_a_list() -> None:
    assert parse_formats("srt, txt,srt", to_files=True) == ("srt", "txt")
    assert parse_formats(",".join(TRANSCRIPT_FORMATS), to_files=True) == TRANSCRIPT_FORMATS
    for text, to_files in (("srt,vtt", False), ("", True), ("doc", True)):
        with pytest.raises(InputError, match="format"):
            parse_formats(text, to_files=to_files)
