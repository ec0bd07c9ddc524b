# SPDX-License-Identifier: Apache-2.0
"""Requests as OpenAI's reference has them. Unknown fields are ignored, as are those without effect here.

What would change the answer and cannot be done is refused: `unsupported` lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from .errors import Refusal


class _Fields(BaseModel):
    # Strict: "0.5" is no number. Not a finite one is none either.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class TextPart(_Fields):
    """`{"type": "text", "text": …}`."""

    type: Literal["text"]
    text: str


class ImageUrl(_Fields):
    """Where a picture is: a data URI, or, where the server allows it, an address."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Fields):
    """`{"type": "image_url", "image_url": {"url": …}}`."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(_Fields):
    """A sound file in base64. What it is is seen from its bytes; `format` is only read."""

    data: str
    format: str | None = None


class AudioPart(_Fields):
    """`{"type": "input_audio", "input_audio": {"data": …, "format": …}}`."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class RefusalPart(_Fields):
    """What an assistant has refused earlier."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | ImagePart | AudioPart | RefusalPart, Field(discriminator="type")]


class CallFunction(_Fields):
    """A call's name, and its arguments as JSON text."""

    name: str
    arguments: str


class Call(_Fields):
    """A tool call in an assistant's turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CallFunction


class Turn(_Fields):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None


class Function(_Fields):
    """A tool's description."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Fields):
    """A tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Fields):
    """The name in a NamedChoice."""

    name: str


class NamedChoice(_Fields):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Fields):
    """A schema with a name."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(_Fields):
    """No form."""

    type: Literal["text"]


class JsonObject(_Fields):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(_Fields):
    """JSON of one schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | JsonObject | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(_Fields):
    """What a stream has beside the answer."""

    include_usage: bool | None = None


class _Generation(_Fields):
    """What both kinds of request have. `top_k`, `min_p` and `repeat_penalty` are llama.cpp's server's."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def unsupported(self) -> tuple[str, str] | None:
        """The first field that asks for what cannot be done, and what can."""
        if self.n not in (None, 1):
            return "n", "only 1 is supported"
        return None


class ChatRequest(_Generation):
    """`POST /v1/chat/completions`."""

    messages: list[Turn]
    max_completion_tokens: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: Format | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    web_search_options: dict[str, Any] | None = None

    def unsupported(self) -> tuple[str, str] | None:
        """See above."""
        if self.audio is not None or any(one != "text" for one in self.modalities or ()):
            return "modalities" if self.audio is None else "audio", "answers are text"
        if self.functions or self.function_call is not None:
            return "functions", "is not supported: use tools and tool_choice"
        if self.web_search_options is not None:
            return "web_search_options", "is not supported: this server goes to no network"
        return super().unsupported()


class CompletionRequest(_Generation):
    """`POST /v1/completions`: a prompt in the model's own markup."""

    prompt: str | list[str]
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: int | None = None

    def unsupported(self) -> tuple[str, str] | None:
        """See above."""
        if isinstance(self.prompt, list) and len(self.prompt) != 1:
            return "prompt", "a text, or a list of one, is supported"
        if self.suffix:
            return "suffix", "is not supported"
        if self.best_of not in (None, 1):
            return "best_of", "only 1 is supported"
        return super().unsupported()


R = TypeVar("R", bound=_Generation)


def parse(kind: type[R], body: bytes) -> R:
    """A request.

    Raises:
        Refusal: 400, the body is not JSON, is nested deeper than 200, or is no such request.
    """
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as exc:  # also for what is no UTF-8 and for nesting: the parser's depth is bounded
        raise Refusal(400, f"the body is not JSON: {str(exc)[:200]}", code="invalid_json") from None
    if not isinstance(raw, Mapping):
        raise Refusal(400, "the body is not a JSON object", code="invalid_json")
    try:
        found = kind.model_validate(raw)
    except ValidationError as exc:
        raise fault(exc) from None
    if (refused := found.unsupported()) is not None:
        name, reason = refused
        raise Refusal(400, f"{name}: {reason}", code="unsupported_value", param=name)
    return found


def fault(error: ValidationError) -> Refusal:
    """400, for the first fault, by the way that leads deepest: of a union it is the member that was meant."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(faults, key=lambda fault: len(fault["loc"]))
    # Names of types stand in the way beside names of fields: those of unions.
    way = [str(step)[:40] for step in first["loc"] if isinstance(step, int) or _is_field(str(step))]
    param = ".".join(way)
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
    return Refusal(400, f"{param}: {first['msg'][:300]}", code=code, param=param or None)


def _is_field(step: str) -> bool:
    return step.isidentifier() and step not in ("str", "list", "NamedChoice")
