# SPDX-License-Identifier: Apache-2.0
"""Transcript files, down to the character."""

from __future__ import annotations

import json

from pocketphi.runtime.transcript import Segment, write

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


def test_an_empty_line_in_the_words_does_not_end_a_cue() -> None:
    assert (
        write([Segment(0, 1, "a\n\n1\n00:00 --> x")], "srt")
        == "1\n00:00:00,000 --> 00:00:01,000\na\n1\n00:00 → x\n"
    )
    assert write([Segment(0, 1, "")], "srt") == ""
