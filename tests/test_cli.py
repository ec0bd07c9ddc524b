# SPDX-License-Identifier: Apache-2.0
"""The program as people and scripts meet it: its own process, exit codes, streams, JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import tiny

ROOT = Path(__file__).resolve().parent.parent
CALL = [sys.executable, "-c", "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"]


def call(env: dict[str, str], *args: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
    done = subprocess.run(
        [*CALL, *map(str, args)], input=stdin, capture_output=True, env=env, timeout=120, check=False
    )
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def failed(env: dict[str, str], *args: str | Path, stdin: bytes = b"") -> tuple[int, str]:
    """Exit code and the one line of an error; nothing may be on stdout."""
    code, out, err = call(env, *args, stdin=stdin)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return code, err


def test_help_imports_nothing_heavy() -> None:
    """What makes --help slow is what it imports: Typer, and none of the libraries behind the commands."""
    script = (
        "import sys; import pocketphi.cli.program; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    loaded = set(subprocess.check_output([sys.executable, "-c", script], text=True).split())
    assert "typer" in loaded
    heavy = {"numpy", "llama_cpp", "gguf", "onnx", "onnxruntime", "tokenizers", "cv2", "rich"}
    assert loaded & (heavy | {"multiprocessing", "socket"}) == set()


def test_run_answers_on_stdout_and_nothing_else(env: dict[str, str]) -> None:
    assert call(env, "run", "-p", "What is the capital of France?") == (
        0,
        "The capital of France is Paris.\n",
        "",
    )


@pytest.mark.parametrize("source", ["dash", "file", "file-dash", "pipe"])
def test_where_the_question_comes_from(source: str, env: dict[str, str], tmp_path: Path) -> None:
    question = "How do you spell tea?\n"
    (tmp_path / "q.txt").write_text(question, "utf-8")
    args = {"dash": ["-p", "-"], "file": ["-f", tmp_path / "q.txt"], "file-dash": ["-f", "-"], "pipe": []}[
        source
    ]
    stdin = b"" if source == "file" else question.encode()
    assert call(env, "run", *args, stdin=stdin)[:2] == (0, "T-E-A.\n")


def test_json(env: dict[str, str]) -> None:
    code, out, err = call(env, "run", "-p", "How do you spell tea?", "--json")
    found = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert found["text"] == "T-E-A."
    assert found["finish_reason"] == "stop"
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + len(found["token_ids"])
    assert set(found["timings"]) >= {"load_ms", "ttft_ms", "prompt_per_second", "predicted_per_second"}
    assert found["peak_rss_bytes"] > 1 << 20
    assert (found["mode"], found["adapter"]) == ("language", None)


def test_tools_print_the_calls(env: dict[str, str], tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(
        '[{"name": "alarm", "description": "Set an alarm", '
        '"parameters": {"hour": {"type": "int"}, "day": {"type": "str"}}}]',
        "utf-8",
    )
    code, out, _ = call(
        env, "run", "--system", "You have some tools.", "--tools", tools, "-p", "Wake me up at 9 on Saturday."
    )
    assert code == 0
    assert json.loads(out) == [{"name": "alarm", "arguments": {"hour": 9, "day": "Saturday"}}]


def test_raw_takes_markup_and_the_plain_way_does_not(env: dict[str, str]) -> None:
    markup = "<|user|>How do you spell tea?<|end|><|assistant|>"
    assert call(env, "run", "--raw", "-p", markup)[1] == "T-E-A.\n"
    plain = json.loads(call(env, "run", "-p", markup, "--json", "-n", "4")[1])
    raw = json.loads(call(env, "run", "--raw", "-p", markup, "--json")[1])
    assert plain["usage"]["prompt_tokens"] > raw["usage"]["prompt_tokens"] + 9


def test_an_adapter_by_name(env: dict[str, str]) -> None:
    found = json.loads(call(env, "run", "-p", "Hi", "--adapter", "vision", "-n", "3", "--json")[1])
    assert (found["mode"], found["adapter"]) == ("vision", "vision")


def test_chat_from_a_pipe(env: dict[str, str]) -> None:
    code, out, err = call(env, "chat", stdin=b"What is the capital of France?\n/stats\n/exit\nHello!\n")
    assert (code, out) == (0, "The capital of France is Paris.\n")
    assert "context" in err


EVAL = tiny.NANO.parent / "eval"


def test_an_image_question(env: dict[str, str]) -> None:
    picture = EVAL / "images" / "img-012.png"
    assert call(env, "run", "--image", picture, "-p", "What does the text say?")[:2] == (
        0,
        "It says chair.\n",
    )


def test_a_spoken_question_about_an_image_needs_no_text(env: dict[str, str]) -> None:
    code, out, err = call(
        env,
        "run",
        "--image",
        EVAL / "images" / "vs-003.png",
        "--audio",
        EVAL / "audio" / "vs-003.flac",
        "--json",
    )
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["text"], found["mode"], found["adapter"]) == (
        "The circle is orange.",
        "vision_speech",
        "vision",
    )
    assert set(found["resident"]) == {"vision adapter", "vision encoder", "speech encoder"}
    assert found["timings"]["encode_ms"] > 0


def test_transcribe_from_a_file_and_from_stdin(env: dict[str, str]) -> None:
    clip = EVAL / "audio" / "asr-000.flac"
    said = "How many legs does a rooster have?\n"
    assert call(env, "transcribe", clip)[:2] == (0, said)
    assert call(env, "transcribe", "-", stdin=clip.read_bytes())[:2] == (0, said)


def test_transcribe_raw_samples_from_stdin(env: dict[str, str]) -> None:
    import soundfile
    import soxr

    samples, rate = soundfile.read(EVAL / "audio" / "asr-000.flac", dtype="float32")
    at_16k = soxr.resample(samples, rate, 16000)
    raw = (at_16k.clip(-1, 1) * 32767).astype("<i2").tobytes()
    assert call(env, "transcribe", "-", stdin=raw)[:2] == (0, "How many legs does a rooster have?\n")


def test_transcript_files(env: dict[str, str], tmp_path: Path) -> None:
    import soundfile

    clip = EVAL / "audio" / "ast-000.flac"
    code, out, _ = call(
        env,
        "transcribe",
        clip,
        "--both",
        "--translate",
        "French",
        "--format",
        "txt,srt,vtt,json,jsonl",
        "-o",
        tmp_path,
    )
    assert (code, out) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".ast-000.flac.done"] + [
        f"ast-000.flac.{f}" for f in ("json", "jsonl", "srt", "txt", "vtt")
    ]
    (segment,) = json.loads((tmp_path / "ast-000.flac.json").read_text("utf-8"))["segments"]
    assert segment["text"] == "The big bird dances behind the car."
    assert segment["translation"] == "Le grand oiseau danse derrière la voiture."
    assert 0.0 <= segment["t0"] < segment["t1"] <= soundfile.info(clip).duration
    assert json.loads((tmp_path / "ast-000.flac.jsonl").read_text("utf-8")) == segment


def test_transcribe_as_json(env: dict[str, str]) -> None:
    clips = [EVAL / "audio" / f"asr-00{i}.flac" for i in (0, 1)]
    code, out, err = call(env, "transcribe", *clips, "--json")
    assert (code, err) == (0, "")
    assert [json.loads(line)["text"] for line in out.splitlines()] == [
        "How many legs does a rooster have?",
        "The small woman works in the garden.",
    ]
    lines = call(env, "transcribe", clips[0], "--format", "jsonl")[1].splitlines()
    assert [json.loads(line) for line in lines] == json.loads(out.splitlines()[0])["segments"]


def recording(path: Path, n_clips: int) -> Path:
    """Evaluation clips with pauses of 1.2 s between them, 16 kHz."""
    import numpy as np
    import soundfile
    import soxr

    parts = []
    for i in range(n_clips):
        samples, rate = soundfile.read(EVAL / "audio" / f"asr-{i % 10:03}.flac", dtype="float32")
        parts += [soxr.resample(samples, rate, 16000), np.zeros(19200, np.float32)]
    soundfile.write(path, np.concatenate(parts), 16000, subtype="PCM_16")
    return path


def test_utterances_come_while_the_audio_does(env: dict[str, str], tmp_path: Path) -> None:
    """Raw samples in a pipe that stays open: the first cue is out before the rest is in."""
    raw = recording(tmp_path / "talk.wav", 12).read_bytes()[44:]
    assert len(raw) > 1 << 20, "standard input is read 1 MiB at a time"
    with subprocess.Popen(
        [*CALL, "transcribe", "-", "--format", "srt"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(raw[: 1 << 20])
        process.stdin.flush()
        first = [process.stdout.readline().decode() for _ in range(3)]
        assert first[0] == "1\n"
        assert first[2] == "How many legs does a rooster have?\n"
        process.stdin.write(raw[1 << 20 :])
        process.stdin.close()
        assert b"\n12\n" in process.stdout.read()
        assert process.wait(timeout=60) == 0


def test_ctrl_c_in_a_transcript_and_going_on(env: dict[str, str], tmp_path: Path) -> None:
    talk = recording(tmp_path / "talk.wav", 12)
    job = ["transcribe", talk, "-o", tmp_path / "out", "--format", "txt,srt,json", "-s", "1"]
    part = tmp_path / "out" / "talk.wav.txt.part"
    with subprocess.Popen([*CALL, *map(str, job)], stderr=subprocess.PIPE, env=env) as process:
        while not part.exists() or not part.read_bytes():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1].decode("utf-8")
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "--resume" in err
    done = part.read_text("utf-8").splitlines()
    assert 1 <= len(done) < 12
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "talk.wav.part.jsonl",
        "talk.wav.srt.part",
        "talk.wav.txt.part",
    ]

    begun = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for other in (["--resume", "--pause", "0.6"], ["--pause", "0.6"]):
        code, line = failed(env, *job, *other)
        assert code == 2
        assert "'pause_s' is 0.7, expected 0.6; --restart begins anew" in line
    code, line = failed(env, *job)
    assert code == 2
    assert "was interrupted after 0:" in line
    assert "--resume goes on, --restart begins anew" in line
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == begun

    code, out, err = call(env, *job, "--resume")
    assert (code, out) == (0, "")
    assert "goes on at 0:" in err
    whole = call(env, *job[:2], "-o", tmp_path / "whole", *job[4:])
    assert whole == (0, "", "")
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == [".talk.wav.done", "talk.wav.json", "talk.wav.srt", "talk.wav.txt"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "out" / "talk.wav.txt").read_text("utf-8").splitlines()[: len(done)] == done

    before = (tmp_path / "out" / "talk.wav.txt").stat().st_mtime_ns
    code, out, err = call(env, *job, "--resume")
    assert (code, out) == (0, "")
    assert "left as they are" in err
    assert (tmp_path / "out" / "talk.wav.txt").stat().st_mtime_ns == before
    code, line = failed(env, *job, "--resume", "--prompt", "Zürich")
    assert code == 2
    assert "'instruction' is" in line
    assert (tmp_path / "out" / "talk.wav.txt").stat().st_mtime_ns == before
    assert call(env, *job, "--restart", "--prompt", "Zürich")[0] == 0
    assert (tmp_path / "out" / "talk.wav.txt").stat().st_mtime_ns > before


def test_restart_throws_an_interrupted_run_away(env: dict[str, str], tmp_path: Path) -> None:
    clip = EVAL / "audio" / "asr-000.flac"
    job = ["transcribe", clip, "-o", tmp_path]
    assert call(env, *job)[0] == 0
    head = (tmp_path / f".{clip.name}.done").read_text("utf-8").replace("record", "journal")
    journal = json.loads(head)
    del journal["formats"]
    wrong = {"t0": 0.0, "t1": 9.0, "text": "Nobody said this.", "translation": None}
    (tmp_path / f"{clip.name}.part.jsonl").write_text(
        f"{json.dumps(journal)}\n{json.dumps(wrong)}\n", "utf-8"
    )
    assert "was interrupted after 0:09" in failed(env, *job)[1]
    assert call(env, *job, "--restart") == (0, "", "")
    assert (tmp_path / f"{clip.name}.txt").read_text("utf-8").startswith("How many legs")


def test_sigterm_in_a_transcript_is_as_ctrl_c(env: dict[str, str], tmp_path: Path) -> None:
    """To files it says how to go on; on stdout the JSON is whole."""
    talk = recording(tmp_path / "talk.wav", 12)
    part = tmp_path / "out" / "talk.wav.txt.part"
    job = [*CALL, "transcribe", str(talk), "-o", str(tmp_path / "out")]
    with subprocess.Popen(job, stderr=subprocess.PIPE, env=env) as process:
        while not part.exists() or not part.read_bytes():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1].decode("utf-8")
    assert process.returncode == 143
    assert err.count("\n") == 1
    assert "--resume goes on from there" in err

    with subprocess.Popen(
        [*CALL, "transcribe", "-", "--json"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        process.stdin.write((talk.read_bytes()[44:] * 3)[: 5 << 19])  # read 1 MiB at a time: two are, by now
        process.stdin.flush()
        process.send_signal(signal.SIGTERM)
        out, err_bytes = process.communicate(timeout=60)
    assert process.returncode == 143
    assert set(json.loads(out)) == {"text", "segments"}
    assert b"--resume" not in err_bytes


def test_one_bad_file_does_not_keep_the_others(env: dict[str, str], tmp_path: Path) -> None:
    clips = [EVAL / "audio" / f"asr-00{i}.flac" for i in (0, 1)]
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    files = [clips[0], tmp_path / "bad.wav", tmp_path / "gone.wav", clips[1]]
    said = "How many legs does a rooster have?\nThe small woman works in the garden.\n"
    code, out, err = call(env, "transcribe", *files)
    assert (code, out) == (2, said)
    assert [line.startswith("error: ") for line in err.splitlines()] == [True, True]
    assert "bad.wav" in err.splitlines()[0]
    assert "gone.wav" in err.splitlines()[1]
    (tmp_path / "out" / "asr-000.flac.txt").mkdir(parents=True)
    code, out, err = call(env, "transcribe", *clips, "/nowhere.wav", "-o", tmp_path / "out")
    assert (code, out, err.count("error: ")) == (6, "", 2), "the code of the first error"
    assert (tmp_path / "out" / "asr-001.flac.txt").is_file()


def test_ctrl_c_leaves_a_whole_transcript_on_stdout(env: dict[str, str], tmp_path: Path) -> None:
    raw = recording(tmp_path / "talk.wav", 12).read_bytes()[44:]
    with subprocess.Popen(
        [*CALL, "transcribe", "-", "--format", "vtt"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(raw[: 1 << 20])
        process.stdin.flush()
        head = b"".join(process.stdout.readline() for _ in range(4))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (head + out).startswith(b"WEBVTT\n\n00:00:0")
    assert (head + out).endswith(b"\n")
    assert err.count(b"\n") == 1
    assert err.startswith(b"standard input: interrupted")
    assert b"--resume" not in err, "a pipe cannot be read again"


def test_silence_is_no_text(env: dict[str, str], tmp_path: Path) -> None:
    silence = bytes(2 * 16000 * 3)
    assert call(env, "transcribe", "-", stdin=silence) == (0, "", "standard input: no speech found\n")
    code, out, _ = call(env, "transcribe", "-", "--json", stdin=silence)
    assert (code, json.loads(out)) == (0, {"text": "", "segments": []})
    assert call(env, "transcribe", "-", "-o", tmp_path, stdin=silence)[0] == 0
    assert (tmp_path / "stdin.txt").read_bytes() == b""


def test_bench_prints_a_table(env: dict[str, str]) -> None:
    rows = json.loads(call(env, "bench", "-r", "1", "-n", "2", "--json")[1])
    assert [r["name"].split()[0] for r in rows] == ["text,", "text,", "image", "image", "speech", "speech"]
    tokens = [r["prompt_n"] for r in rows]
    assert tokens[3] - tokens[2] == 1841 - 545, "the reference's counts for these two sizes"
    assert tokens[5] - tokens[4] == 375 - 125


USAGE = [
    (["run", "-p", ""], "empty"),
    (["run", "-p", "   \n"], "empty"),
    (["run", "-p", "x", "-f", "y"], "expected one"),
    (["run", "-p", "x", "--temp", "abc"], "--temp"),
    (["run", "-p", "x", "--temp", "-1"], "temperature"),
    (["run", "-p", "x", "--temp", "nan"], "temperature"),
    (["run", "-p", "x", "--top-p", "0"], "top-p"),
    (["run", "-p", "x", "-n", "0"], "-n is 0"),
    (["run", "-p", "x", "-n", "-2"], "-n"),
    (["run", "-p", "x", "-t", "0"], "threads is 0"),
    (["run", "-p", "x", "-c", "-5"], "context is -5"),
    (["run", "-p", "x", "-c", "9999999"], "context is 9999999"),
    (["run", "-p", "x", "-c", "3"], "the context holds 3"),
    (["run", "-p", "x", "-s", "-7"], "seed"),
    (["run", "-p", "x", "--adapter", "smell"], "adapter"),
    (["run", "-p", "x", "--cache-type", "q9"], "KV type"),
    (["run", "-p", "x", "-ngl", "4"], "GPU"),
    (["run", "-p", "x", "--grammar", "nonsense"], "grammar"),
    (["run", "-p", "x", "-j", "{"], "JSON schema"),
    (["run", "-p", "x", "--tools", "/nowhere"], "no such file"),
    (["run", "-p", "x", "--raw", "--system", "y"], "--raw"),
    (["run", "--no-such-flag"], "--no-such-flag"),
    (["frobnicate"], "frobnicate"),
    (["run", "-p", "x", "--image", "/nowhere.png"], "/nowhere.png"),
    (["run", "-p", "x", "--audio", "/nowhere.wav"], "/nowhere.wav"),
    (["run", "-p", "x", "--video", "/nowhere.mp4"], "/nowhere.mp4"),
    (["run", "-p", "x", "--camera", "99"], "camera 99"),
    (["run", "-p", "x", "--camera", "-1"], "camera -1"),
    (["run", "-p", "x", "--camera", "99999999999"], "camera 99999999999"),
    (["run", "-p", "x", "--video", "x" * 5000], "cannot be opened"),
    (["run", "-p", "x", "-j", '{"type": "integer", "minimum": 5}'], "minimum"),
    (["bench", "--only", "nothing"], "no case"),
    (["transcribe", "x", "--translate", " "], "empty"),
    (["run", "-p", "x", "--max-crops", "0"], "max crops"),
    (["run", "-p", "-", "--audio", "-"], "standard input"),
    (["transcribe", "/nowhere.wav"], "/nowhere.wav"),
    (["transcribe", "x", "--format", "doc"], "format 'doc'"),
    (["transcribe", "x", "--format", "srt,vtt"], "2 formats"),
    (["transcribe", "x", "--both"], "language"),
    (["transcribe", "x", "--json", "--format", "srt"], "--json and --format"),
    (["transcribe", "x", "--json", "-o", "y"], "-o"),
    (["transcribe", "x", "--resume"], "-o"),
    (["transcribe", "-", "--resume", "-o", "/dev/null/y"], "standard input"),
    (["transcribe", "x", "y", "--format", "jsonl"], "2 files"),
    (["transcribe", "x", "--pause", "nan"], "--pause is nan s"),
    (["transcribe", "-", "-"], "- is given twice"),
    (["transcribe", "x", "-o", ""], "is empty"),
    (["transcribe", "x", "--format", ""], "format ''"),
    (["transcribe", "x", "--restart"], "--restart"),
    (["transcribe", "x", "--resume", "--restart", "-o", "/dev/null/y"], "expected one"),
    (["transcribe", "x", "--instruction", "\udcff"], "--instruction is not Unicode"),
    (["transcribe", "x", "--prompt", "a\udcff"], "--prompt is not Unicode"),
    (["transcribe", "x", "--translate", "\udcff"], "--translate is not Unicode"),
    (["transcribe", "x", "--pause", "-1"], "pause"),
    (["transcribe", "x", "--prompt", " "], "prompt"),
    (["transcribe", "x", "--prompt", "y", "--instruction", "z"], "one of them"),
    (["convert", "/nowhere"], "-o DIR"),
]


@pytest.mark.parametrize(
    ("args", "want"), USAGE, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else None
)
def test_usage_errors_are_exit_2_and_one_line(args: list[str], want: str, env: dict[str, str]) -> None:
    code, line = failed(env, *args)
    assert code == 2
    assert want in line


def test_input_that_is_not_utf_8(env: dict[str, str]) -> None:
    assert failed(env, "run", "-p", "-", stdin=b"ab\xff")[0] == 2


def test_errors_have_their_codes(env: dict[str, str], tmp_path: Path) -> None:
    assert failed(env, "run", "-m", tmp_path / "gone", "-p", "x")[0] == 3
    assert failed(env, "info", tmp_path)[0] == 3
    assert failed(env, "convert", tmp_path, "-o", tmp_path / "out")[0] == 5
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").touch()
    assert failed(env, "convert", tiny.NANO, "-o", tmp_path / "taken")[0] == 6


def test_convert_then_info_then_run(env: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "model"
    code, printed, err = call(env, "convert", tiny.NANO, "-o", out, "--quant", "Q4_K_M")
    assert (code, printed) == (0, "")
    assert str(out) in err
    code, listing, err = call(env, "info", out, "--check")
    assert code == 0
    assert "Q4_K_M" in listing
    assert err.count("ok  ") == len(list(out.iterdir())) - 1
    found = json.loads(call(env, "info", out, "--json")[1])
    assert found["total_bytes"] == sum(p.stat().st_size for p in out.iterdir() if p.name != "bundle.json")
    assert (
        call(env, "run", "-m", out, "-p", "What is the capital of France?")[1]
        == "The capital of France is Paris.\n"
    )
    victim = out / found["decoder"]
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    code, _, err = call(env, "info", out, "--check")
    assert code == 3
    assert "SHA-256" in err


@pytest.mark.parametrize(
    ("args", "want"),
    [
        (["--backbone", "onnx", "--quant", "Q4_0"], "onnx: its type is --onnx-quant"),
        (["--backbone", "onnx", "-q", "Q4_K_M"], "--onnx-quant"),  # the default's name, but asked for
        (["--backbone", "ONNX", "--lora-quant", "F16"], "--onnx-lora"),
        (["--backbone", "onnx", "--imatrix", "x.gguf"], "--imatrix"),
        (["--onnx-quant", "int8"], "gguf: add --backbone onnx or both"),
        (["--backbone", "gguf", "--onnx-lora", "int8"], "--onnx-lora"),
        (["--backbone", "safetensors"], "expected one of gguf, onnx, both"),
        (["--backbone", "both", "--onnx-quant", "int2"], "'int2' is not known"),
        (["--backbone", "both", "--onnx-lora", "Q8_0"], "one of fp32, fp16, int8"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_backbones_have_flags_of_their_own(
    args: list[str], want: str, env: dict[str, str], tmp_path: Path
) -> None:
    code, line = failed(env, "convert", tiny.NANO, "-o", tmp_path / "m", *args)
    assert code == 2
    assert want in line
    assert list(tmp_path.iterdir()) == []


def test_convert_to_onnx_then_info(env: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "model"
    flags = ["--backbone", "onnx", "--onnx-quant", "int8", "--onnx-lora", "int8", "--encoders", "int4"]
    plan = json.loads(call(env, "convert", tiny.NANO, "--dry-run", "--json", *flags)[1])
    assert plan["backbones"] == ["onnx"]
    assert plan["onnx_files"]["model.onnx.data"] > 1 << 20
    code, printed, err = call(env, "convert", tiny.NANO, "-o", out, *flags)
    assert (code, printed) == (0, "")
    assert "int8" in err
    code, _, err = call(env, "info", out, "--check")
    assert (code, err.count("ok  ")) == (0, len(list(out.iterdir())) - 1)
    found = json.loads(call(env, "info", out, "--json")[1])
    assert (found["decoder"], found["onnx"]["lora_quant"], found["recipe"]) == (None, "int8", "int8")


def test_dry_run_writes_nothing(env: dict[str, str], tmp_path: Path) -> None:
    code, out, _ = call(env, "convert", tiny.NANO, "-o", tmp_path / "m", "--dry-run")
    assert code == 0
    assert "blk.0.ffn_down.weight" in out
    assert not (tmp_path / "m").exists()
    plan = json.loads(call(env, "convert", tiny.NANO, "--dry-run", "--json")[1])
    assert plan["total_bytes"] > 1 << 20


def test_ctrl_c_is_130_and_leaves_no_model(env: dict[str, str], tmp_path: Path) -> None:
    """A generation without an end is interrupted; the answer so far is on stdout."""
    process = subprocess.Popen(
        [*CALL, "run", "-p", "Hi", "--grammar", 'root ::= "ha " root', "-c", "8192"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(3) == b"ha "
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert out.strip(b"ha ") == b""


def test_a_reader_that_leaves_is_not_an_error_message(env: dict[str, str]) -> None:
    endless = [*CALL, "run", "-p", "Hi", "--grammar", 'root ::= "ha " root']
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) != 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_standard_stream_is_no_crash(closed: str, env: dict[str, str]) -> None:
    import shlex

    line = shlex.join([*CALL, "run", "-p", "How do you spell tea?"])
    done = subprocess.run(
        f"{line} {closed}", shell=True, capture_output=True, env=env, timeout=60, check=False
    )
    if closed == ">&-":  # the answer is lost, and a script has to know
        assert done.returncode == 6
        assert done.stderr.startswith(b"error: standard output: cannot be written")
        assert done.stderr.count(b"\n") == 1
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, b"T-E-A.\n", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_standard_output_is_one_line(env: dict[str, str]) -> None:
    with Path("/dev/full").open("wb") as full:
        for args in (["run", "-p", "How do you spell tea?", "--json"], ["info"]):
            done = subprocess.run(
                [*CALL, *args], stdout=full, stderr=subprocess.PIPE, env=env, timeout=60, check=False
            )
            assert done.returncode == 6
            assert done.stderr.count(b"\n") == 1
            assert done.stderr.startswith(b"error: standard output: cannot be written")


def test_a_terminal_without_the_character(env: dict[str, str]) -> None:
    ascii_only = env | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    code, out, err = call(ascii_only, "run", "-p", "Hi", "--grammar", 'root ::= "größer"')
    assert (code, out, err) == (0, "gr??er\n", "")


def test_transcripts_never_overwrite_each_other(env: dict[str, str], tmp_path: Path) -> None:
    clip = EVAL / "audio" / "asr-000.flac"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / clip.name).write_bytes(clip.read_bytes())
    code, line = failed(env, "transcribe", clip, tmp_path / "a" / clip.name, "-o", tmp_path / "out")
    assert code == 2
    assert "same name" in line
    assert failed(env, "transcribe", clip, clip, "--format", "srt")[0] == 2
    assert call(env, "transcribe", clip, "-o", tmp_path / "new" / "folder")[0] == 0
    assert (tmp_path / "new" / "folder" / "asr-000.flac.txt").read_text("utf-8").startswith("How many legs")


def test_two_first_runs_at_once(env: dict[str, str], tmp_path: Path) -> None:
    """Both find an empty cache and convert the built-in model; both answer."""
    fresh = env | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    both = [
        subprocess.Popen([*CALL, "run", "-p", "How do you spell tea?"], stdout=subprocess.PIPE, env=fresh)
        for _ in range(2)
    ]
    assert [p.communicate(timeout=120)[0] for p in both] == [b"T-E-A.\n"] * 2
    left = [p.name for p in (tmp_path / "cache").rglob("*") if ".partial" in p.name and p.is_dir()]
    assert left == []
