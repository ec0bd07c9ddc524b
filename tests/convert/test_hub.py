# SPDX-License-Identifier: Apache-2.0
"""Folders and cached snapshots resolve without a network; a hub on this machine stands in for the real one.

huggingface_hub reads its environment when it is imported, so each case with a cache of its own runs
in a process of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.hub import resolve
from pocketphi.runtime.errors import CheckpointError, InputError, PocketPhiError

from .handmade import INDEX, put, sharded, single, weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "some-org/phi.test"
NOWHERE = "http://127.0.0.1:9"  # the discard port: connections are refused at once

SCRIPT = """
import json, sys
from pocketphi.convert import hub
from pocketphi.runtime.errors import PocketPhiError
options = json.loads(sys.argv[1])
hub._TIMEOUT_S = 1.0
try:
    path, name, revision = hub.resolve(from_hub=True, **options)
    print(json.dumps(["found", str(path), name, revision]))
except PocketPhiError as error:
    print(json.dumps(["refused", type(error).__name__, str(error)]))
"""


def run(
    home: Path,
    endpoint: str,
    *,
    source: str = REPOSITORY,
    revision: str | None = None,
    offline: bool = False,
    **environment: str,
) -> list[str]:
    """What `resolve(from_hub=True)` gives or says, with this cache and this hub."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
    }
    own = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    options = json.dumps({"source": source, "revision": revision, "offline": offline})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, options],
        env=clean | own | environment,
        capture_output=True,
        text=True,
        timeout=120,  # not a measurement: a hang must not stop the whole run
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result: list[str] = json.loads(done.stdout.splitlines()[-1])
    return result


def refusal(result: list[str]) -> str:
    kind, error, text = result
    assert (kind, error) == ("refused", "CheckpointError")
    assert text.startswith(f"{REPOSITORY}: ") and len(text.splitlines()) == 1 and text.isprintable()
    return text.removeprefix(f"{REPOSITORY}: ")


def cached(home: Path) -> Path:
    """An empty snapshot as the hub's client lays it out, known as the main branch."""
    store = home / "hub" / "models--some-org--phi.test"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(COMMIT)
    snapshots = store / "snapshots"
    snapshots.mkdir()
    return snapshots / COMMIT


class Hub(ThreadingHTTPServer):
    """The three answers of the real hub that a download needs, and a list of what was asked."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.asked: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        for revision in ("main", COMMIT):
            if path == f"/api/models/{REPOSITORY}/revision/{revision}":
                names = [{"rfilename": name} for name in self.server.files]
                self.send(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": names}).encode(), body)
                return
            name = path.removeprefix(f"/{REPOSITORY}/resolve/{revision}/")
            if name in self.server.files:
                self.send(self.server.files[name], body)
                return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with one small checkpoint, and beside it all that must never be fetched."""
    made = sharded(tmp_path / "published")
    made.joinpath(INDEX).write_text(
        made.joinpath(INDEX).read_text().replace("one.s", "model-1.s").replace("two.s", "model-2.s")
    )
    made.joinpath("one.safetensors").rename(made / "model-1.safetensors")
    made.joinpath("two.safetensors").rename(made / "model-2.safetensors")
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    files |= {"LICENSE": b"MIT", "chat_template.jinja": b"{{ x }}"}
    unwanted = ["modeling_phi.py", "config.json.py", "README.md", "figures/x.json", "onnx/model.safetensors"]
    unwanted += ["pytorch_model.bin", "model.bin", "model.pt", "vision-lora/adapter_model.bin"]
    server = Hub(files | dict.fromkeys(unwanted, b"never"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cached_snapshot_needs_no_network(tmp_path: Path, hub: Hub) -> None:
    snapshot = single(cached(tmp_path / "home"))
    want = ["found", str(snapshot), REPOSITORY, COMMIT]
    assert run(tmp_path / "home", hub.endpoint) == want
    assert run(tmp_path / "home", hub.endpoint, revision=COMMIT, offline=True) == want
    assert hub.asked == []


def test_nothing_cached_and_offline(tmp_path: Path, hub: Hub) -> None:
    said = "revision main is not in the local cache, and the network is off"
    assert refusal(run(tmp_path, hub.endpoint, offline=True)) == said
    assert refusal(run(tmp_path, hub.endpoint, HF_HUB_OFFLINE="1")) == said
    assert hub.asked == []


@pytest.mark.parametrize("missing", ["tokenizer.json", "two.safetensors"])
def test_a_snapshot_in_part_and_offline(missing: str, tmp_path: Path) -> None:
    snapshot = sharded(cached(tmp_path))
    (snapshot / missing).unlink()
    said = f"lacks {missing} in the local cache, and the network is off"
    assert refusal(run(tmp_path, NOWHERE, offline=True)) == said


def test_native_multimodal_needs_its_adapters(tmp_path: Path) -> None:
    snapshot = single(cached(tmp_path))
    put(snapshot / "config.json", {"model_type": "phi4_multimodal"})
    said = "lacks vision-lora/adapter_config.json in the local cache, and the network is off"
    assert refusal(run(tmp_path, NOWHERE, offline=True)) == said
    for name in ("vision-lora", "speech-lora"):
        put(snapshot / name / "adapter_config.json", {})
        weights(snapshot / name / "adapter_model.safetensors", "x")
    assert run(tmp_path, NOWHERE, offline=True)[0] == "found"


def test_a_download_takes_what_is_read_and_nothing_else(tmp_path: Path, hub: Hub) -> None:
    kind, path, name, revision = run(tmp_path / "home", hub.endpoint)
    assert (kind, name, revision) == ("found", REPOSITORY, COMMIT)
    with Checkpoint.open(Path(path)) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b", "c"}
        assert (checkpoint.licence_text, checkpoint.chat_template) == ("MIT", "{{ x }}")
    fetched = {asked.split("/", 5)[5] for asked in hub.asked if "/resolve/" in asked}
    wanted = {"config.json", "tokenizer.json", INDEX, "model-1.safetensors", "model-2.safetensors"}
    assert fetched == wanted | {"LICENSE", "chat_template.jinja"}
    assert {p.name for p in Path(path).rglob("*")} == fetched

    hub.asked.clear()  # the branch's commit is remembered
    assert run(tmp_path / "home", hub.endpoint) == [kind, path, name, revision]
    assert run(tmp_path / "home", NOWHERE, offline=True) == [kind, path, name, revision]
    assert hub.asked == []


def test_a_snapshot_in_part_is_completed(tmp_path: Path, hub: Hub) -> None:
    put(cached(tmp_path / "home") / "config.json", hub.files["config.json"])
    kind, path, *_ = run(tmp_path / "home", hub.endpoint)
    assert kind == "found"
    Checkpoint.open(Path(path)).close()


def test_a_repository_without_safetensors(tmp_path: Path, hub: Hub) -> None:
    for name in [name for name in hub.files if name.endswith((".safetensors", INDEX))]:
        del hub.files[name]
    said = "lacks config.json, tokenizer.json or safetensors weights"
    assert refusal(run(tmp_path / "home", hub.endpoint)) == said
    assert not any("/resolve/" in asked for asked in hub.asked)


def test_no_such_repository(tmp_path: Path, hub: Hub) -> None:
    kind, error, text = run(tmp_path / "home", hub.endpoint, source="some-org/other")
    assert (kind, error) == ("refused", "CheckpointError")
    assert text == "some-org/other: cannot be fetched from the hub: no such repository, or it is private"


def test_no_connection(tmp_path: Path) -> None:
    text = refusal(run(tmp_path, NOWHERE))
    assert text.startswith("cannot be fetched from the hub: ") and "refused" in text


def test_a_hub_that_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        text = refusal(run(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert text.startswith("cannot be fetched from the hub: ") and "timed out" in text.lower()


def test_without_the_package(tmp_path: Path) -> None:
    put(tmp_path / "block" / "huggingface_hub.py", b"raise ImportError('not here')")
    paths = os.pathsep.join([str(tmp_path / "block"), os.environ.get("PYTHONPATH", "")])
    kind, error, text = run(tmp_path, NOWHERE, PYTHONPATH=paths)
    assert (kind, error) == ("refused", "InputError")
    assert text == "--from-hub needs huggingface_hub: pip install 'pocketphi[hub]'"


# -- without --from-hub --------------------------------------------------------------------------


def test_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = single(tmp_path / "phi-mine")
    assert resolve(str(root), from_hub=False, revision=None) == (root, "phi-mine", None)
    monkeypatch.chdir(root)
    assert resolve(".", from_hub=False, revision=None) == (Path(), "phi-mine", None)


def test_a_directory_of_the_cache_knows_its_name(tmp_path: Path) -> None:
    snapshot = single(cached(tmp_path))
    assert resolve(str(snapshot), from_hub=False, revision=None) == (snapshot, REPOSITORY, COMMIT)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("microsoft/Phi-4-mini-instruct", "no such directory; to take it from the hub, add --from-hub"),
        ("absent", "No such file or directory"),
        ("a/b/c", "No such file or directory"),
        ("nul\0byte", "null"),
        ("two\nlines", "No such file or directory"),
        ("n" * 5000, "name too long"),
    ],
    ids=["repository", "absent", "path", "NUL", "lines", "long"],
)
def test_no_such_directory(source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        resolve(source, from_hub=False, revision=None)
    text = str(error.value)
    assert said in text and len(text.splitlines()) == 1 and text.isprintable()


def input_error(source: str, *, from_hub: bool, revision: str | None) -> str:
    with pytest.raises(PocketPhiError) as error:
        resolve(source, from_hub=from_hub, revision=revision, offline=from_hub)
    assert type(error.value) is InputError
    text = str(error.value)
    assert len(text.splitlines()) == 1 and text.isprintable()
    return text


def test_an_empty_name() -> None:
    assert "is empty, expected a directory" in input_error("", from_hub=False, revision=None)


def test_a_revision_needs_the_hub(tmp_path: Path) -> None:
    assert "needs --from-hub" in input_error(str(tmp_path), from_hub=False, revision="main")


NO_REPOSITORY = [
    "",
    "phi",
    "a/b/c",
    "/etc",
    "../x",
    "a/..",
    "a/.b",
    "a--b/c",
    "a/b..c",
    "a b/c",
    "a/b\n",
    "-x/y",
]


@pytest.mark.parametrize("source", [*NO_REPOSITORY, "a/" + "b" * 97, "https://hub.test/a/b", "a/é"])
def test_names_that_are_no_repository(source: str) -> None:
    assert "is not a hub repository, expected organisation/name" in input_error(
        source, from_hub=True, revision=None
    )


@pytest.mark.parametrize("revision", ["", "../x", "a/../b", "-x", "/x", "a b", "a\n", "x" * 129, "a\0"])
def test_names_that_are_no_revision(revision: str) -> None:
    assert "is not a revision" in input_error("a/b", from_hub=True, revision=revision)
