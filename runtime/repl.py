# SPDX-License-Identifier: Apache-2.0
"""The chat loop: turns and slash commands. Where text comes from and goes to is the terminal's business."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from . import ggml_plugin
from .engine import ChatOptions, Model
from .errors import InputError, PocketPhiError, one_line
from .files import check_file, check_not_model, read_text, write_text
from .parts import Media, MediaKind, Message, Reply, Role, ToolCall
from .report import kernels_line

if TYPE_CHECKING:
    from .segments import SegmentRules
    from .sources import Source

FORMAT = "pocketphi-chat"
VERSION = 1
_SAVED_MAX_BYTES = 64 << 20
_FRAMES = 8  # of a video

HELP = """\
/help            this list
/reset           forget the conversation, keep the system prompt
/system [TEXT]   show or set the system prompt
/save FILE       write the conversation as JSON
/load FILE       read it back
/mic [TEXT]      speak the next message: it ends, and is sent, when you pause
/image FILE      a picture for the next message; also /audio FILE, /camera, /video FILE [FRAMES]
/stats           context used, speed of the last answer
/exit            leave (also /quit, Ctrl-D)
A line that ends in \\ goes on in the next one; \"\"\" begins and ends several lines.
Ctrl-C stops the answer. To begin a message with a slash, write //."""


class Terminal(Protocol):
    """Where the chat happens."""

    def read(self, prompt: str) -> str | None:
        """One line without its newline; None at the end of input."""

    def write(self, text: str, style: Literal["answer", "reasoning"] = "answer") -> None:
        """A piece of an answer, shown at once."""

    def say(self, line: str) -> None:
        """A comment beside the conversation."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What stays the same over a chat."""

    options: ChatOptions
    show_reasoning: bool = True
    microphone: Callable[[], Source] | None = None  # opens it, for /mic; None: the system's default device
    turn_rules: SegmentRules | None = None  # what ends a spoken message; None: the usual pause


class Repl:
    """One chat. `run` returns when the person leaves."""

    def __init__(
        self,
        model: Model,
        settings: ChatSettings,
        terminal: Terminal,
        *,
        system: str | None,
        media: Sequence[Media] = (),
    ) -> None:
        """
        Args:
            model: answers.
            settings: sampling, tools, and whether reasoning is shown.
            terminal: reads and writes.
            system: the system prompt to begin with.
            media: pictures and clips for the first message.
        """
        self._model, self._settings, self._terminal = model, settings, terminal
        self._system = system
        self._turns: list[Message] = []
        self._waiting: list[Media] = list(media)  # for the next message
        self._last: Reply | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: terminal.say(HELP),
            "/reset": lambda _: self._reset(),
            "/system": self._set_system,
            "/save": self._save,
            "/load": self._load,
            "/image": lambda name: self._attach([self._file("image", name)]),
            "/audio": lambda name: self._attach([self._file("audio", name)]),
            "/video": self._video,
            "/camera": lambda _: self._camera(),
            "/mic": self._mic,
            "/stats": lambda _: self._stats(),
        }

    def run(self) -> None:
        """Read and answer until /exit or the end of input."""
        while True:
            try:
                text = self._read_message()
            except KeyboardInterrupt:
                self._terminal.say("(/exit or Ctrl-D leaves)")
                continue
            if text is None or text.split()[:1] in (["/exit"], ["/quit"]):
                return
            if not text.strip() and not any(m.kind == "audio" for m in self._waiting):
                continue  # an empty line is a message only where the question is spoken
            try:
                self._handle(text)
            except PocketPhiError as exc:
                self._terminal.say(f"error: {exc}")

    def _handle(self, text: str) -> None:
        if text.startswith("//"):
            text = text[1:]
        elif text.startswith("/"):
            name, _, rest = text.partition(" ")
            if name not in self._commands:
                raise InputError(f"no command {name[:40]!r}: /help lists them")
            self._commands[name](rest.strip())
            return
        self._send(text)

    def _send(self, text: str, *spoken: Media) -> None:
        self._answer(Message("user", text, media=(*self._waiting, *spoken)))
        self._waiting = []  # kept for another try where the message could not be used

    def _answer(self, message: Message) -> None:
        reply = self._turn(message)
        while reply.tool_calls:
            result = self._ask_result(reply.tool_calls)
            if result is None:
                return
            reply = self._turn(Message("tool", result))

    def _turn(self, message: Message) -> Reply:
        """One message and its answer; neither stays in the conversation if there was no answer at all."""
        turns = [*self._turns, message]
        head = [] if self._system is None else [Message("system", self._system)]
        answer = self._model.chat([*head, *turns], stream=True, **self._settings.options)
        try:
            for event in answer:
                if event.kind == "answer" or self._settings.show_reasoning:
                    self._terminal.write(event.text, event.kind)
        except KeyboardInterrupt:
            answer.close()
            self._terminal.say("\n(stopped)")
        else:
            self._terminal.write("\n")
        self._last = reply = answer.reply
        if reply.text or reply.tool_calls:
            self._turns = [*turns, Message("assistant", reply.text, reply.tool_calls)]
        if reply.finish_reason == "length":
            self._terminal.say("(cut off: the limit of tokens is reached)")
        return reply

    def _ask_result(self, calls: tuple[ToolCall, ...]) -> str | None:
        """The person plays the tool: an empty line leaves the call unanswered."""
        for call in calls:
            self._terminal.say(
                f"the model calls {call.name}({json.dumps(call.arguments, ensure_ascii=False)})"
            )
        return self._terminal.read("result> ") or None

    def _read_message(self) -> str | None:
        line = self._terminal.read("> ")
        if line is None:
            return None
        if line.startswith('"""'):
            return self._read_block(line[3:])
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            following = self._terminal.read(". ")
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines)

    def _read_block(self, first: str) -> str:
        lines = [first] if first else []
        while not (lines and lines[-1].endswith('"""')):
            following = self._terminal.read(". ")
            if following is None:
                return "\n".join(lines)
            lines.append(following)
        lines[-1] = lines[-1][:-3]
        return "\n".join(lines).strip("\n")

    def _attach(self, media: list[Media]) -> None:
        self._waiting += media
        names = ", ".join(m.name for m in self._waiting)
        self._terminal.say(f"(with the next message: {names})")

    def _file(self, kind: MediaKind, name: str) -> Media:
        path = _path(name, f"/{kind}")
        check_file(path)
        return Media(kind, path, str(path))

    def _video(self, rest: str) -> None:
        from .video import as_media

        name, _, count = rest.rpartition(" ")
        if not (count.isascii() and count.isdecimal() and name):
            name, count = rest, str(_FRAMES)
        media, tokens = as_media(_path(name, "/video"), int(count[:9]))
        self._terminal.say(f"({len(media)} frames, {tokens} tokens)")
        self._attach(media)

    def _camera(self) -> None:
        from .video import camera

        self._attach([Media("image", camera(), "camera")])

    def _mic(self, text: str) -> None:
        from .spoken_turn import open_microphone, record_turn  # loaded when asked for

        self._model.bundle.encoder("speech", "listen")  # before somebody speaks to it
        opened = self._settings.microphone or open_microphone
        try:
            heard = record_turn(opened(), self._settings.turn_rules, self._terminal.say)
        except KeyboardInterrupt:
            self._terminal.say("\n(not sent)")
            return
        if heard is None:
            self._terminal.say("(nothing was said)")
            return
        spoken = Media("audio", heard, "microphone")
        try:
            self._send(text, spoken)
        except PocketPhiError:
            self._attach([spoken])  # nobody has to say it again
            raise

    def _reset(self) -> None:
        self._turns, self._waiting = [], []
        self._terminal.say("(conversation forgotten)")

    def _set_system(self, text: str) -> None:
        if text:
            self._system = text
        self._terminal.say(f"system prompt: {self._system or '(none)'}")

    def _stats(self) -> None:
        say, last = self._terminal.say, self._last
        used, limit = self._model.context_used, self._model.context_limit
        say(f"context {used} of {limit} tokens, {len(self._turns)} turns")
        say(f"in memory: {', '.join(('backbone', *self._model.resident))}")
        kernels = ggml_plugin.load()
        say(f"kernels: {kernels_line(kernels, ggml_plugin.counts(kernels))}")
        if last is not None:
            t, u = last.timings, last.usage
            say(f"last prompt {u.prompt_tokens} tokens, {u.cached_tokens} of them from the cache")
            say(f"read {t.prompt_per_second:.1f} tokens/s, wrote {t.predicted_per_second:.1f} tokens/s")

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        if any(t.media for t in self._turns):
            raise InputError("this conversation holds pictures or clips, which a saved chat cannot")
        turns = [
            {"role": t.role, "content": t.content}
            | (
                {"tool_calls": [{"name": c.name, "arguments": c.arguments} for c in t.tool_calls]}
                if t.tool_calls
                else {}
            )
            for t in self._turns
        ]
        saved = {
            "format": FORMAT,
            "version": VERSION,
            "model": self._model.bundle.name,
            "system": self._system,
        }
        check_not_model(path.parent)
        write_text(path, json.dumps(saved | {"messages": turns}, ensure_ascii=False, indent=1) + "\n")
        self._terminal.say(f"(saved {len(turns)} turns to {name})")

    def _load(self, name: str) -> None:
        self._system, self._turns = read_chat(_path(name, "/load"))
        self._terminal.say(f"(loaded {len(self._turns)} turns)")


def _path(name: str, command: str) -> Path:
    """A file name as typed, `~` included."""
    if not name:
        raise InputError(f"{command} needs a file name")
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no such user
        return Path(name)


def read_chat(path: Path) -> tuple[str | None, list[Message]]:
    """A conversation that `/save` wrote: the system prompt and the turns.

    Raises:
        InputError: no such file, or not one of ours.
    """
    text = read_text(path, max_bytes=_SAVED_MAX_BYTES)
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path}: is not JSON: {one_line(exc)}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise InputError(f"{path}: is not a {FORMAT} file of version {VERSION}")
    system, messages = raw.get("system"), raw.get("messages")
    if not (system is None or isinstance(system, str)) or not isinstance(messages, list):
        raise InputError(f"{path}: has no list of messages")
    return system, [_turn_from(m, path) for m in messages]


def _turn_from(raw: Any, path: Path) -> Message:
    if (
        not isinstance(raw, dict)
        or raw.get("role") not in get_args(Role)
        or not isinstance(raw.get("content"), str)
    ):
        raise InputError(f"{path}: holds a message without a role and content")
    calls = raw.get("tool_calls", [])
    if not isinstance(calls, list) or not all(
        isinstance(c, dict) and isinstance(c.get("name"), str) and isinstance(c.get("arguments"), dict)
        for c in calls
    ):
        raise InputError(f"{path}: holds a tool call without a name and arguments")
    return Message(
        cast(Role, raw["role"]), raw["content"], tuple(ToolCall(c["name"], c["arguments"]) for c in calls)
    )
