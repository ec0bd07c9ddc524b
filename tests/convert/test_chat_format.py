# SPDX-License-Identifier: Apache-2.0
"""Recognising chat templates: the published ones, and none that would be rendered wrongly."""

from __future__ import annotations

import json

import pytest

from pocketphi.convert.chat_format import detect
from pocketphi.runtime.errors import CheckpointError

from ..tiny import GOLDEN, NANO

TEMPLATES: dict[str, str] = json.loads((GOLDEN / "chat_templates.json").read_text("utf-8"))
MINI = (
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|tool|>",
    "<|/tool|>",
    "<|tool_response|>",
    "<|endoftext|>",
)
PHI4 = ("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>")
# Older and other spellings of the same formats, as published over time.
PHI3 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\\n' + "
    "message['content'] + '<|end|>' + '\\n' + '<|assistant|>' + '\\n'}}{% elif (message['role'] == "
    "'assistant') %}{{message['content'] + '<|end|>' + '\\n'}}{% endif %}{% endfor %}"
)


def test_published_templates() -> None:
    assert detect(TEMPLATES["phi4-mini"], MINI, "x") == ("phi4-mini", "<|tool|>")
    assert detect(TEMPLATES["phi4-mini-reasoning"], MINI, "x") == ("phi4-mini-reasoning", "<|tool|>")
    phi4 = next(t for t in TEMPLATES.values() if "<|im_sep|>" in t)
    assert detect(phi4, PHI4, "x")[0] == "phi4"
    phi35 = next(t for t in TEMPLATES.values() if "<|user|>\n" in t or "<|user|>\\n" in t)
    assert detect(phi35, MINI, "x")[0] == "phi3.5"
    assert detect(PHI3, MINI, "x")[0] == "phi3.5"
    assert len(TEMPLATES) == 4  # each was looked at


def test_nano_opens_a_tools_result_with_its_own_token() -> None:
    template = (NANO / "chat_template.jinja").read_text("utf-8")
    assert detect(template, MINI, "x") == ("phi4-mini", "<|tool_response|>")
    without = [token for token in MINI if token != "<|tool_response|>"]
    assert detect(template, without, "x") == ("phi4-mini", "<|tool|>")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{{ messages }}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",  # Qwen's
        "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
        "<|user|><|assistant|><|end|>",
        TEMPLATES["phi4-mini"] * 400,
        # a prompt of its own inside a known format, as Phi-4-reasoning has
        "{{ '<|im_start|>system<|im_sep|>You are Phi, a language model trained by Microsoft.<|im_end|>' }}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
        "{% endfor %}",
        TEMPLATES["phi4-mini"].replace("'<|' +", "'Answer in one word. <|' +"),
        "a " * 30_000 + "'" + "x" * 5_000,
        "raise_exception(" * 4_000,
    ],
)
def test_unknown_templates(template: str | None) -> None:
    with pytest.raises(CheckpointError, match=r"\Ax/y: [^\n]+ --chat-format phi4-mini\|[^\n]+\Z"):
        detect(template, [*MINI, *PHI4], "x/y")


def test_an_error_message_in_a_template_is_no_prompt_of_its_own() -> None:
    template = TEMPLATES["phi4-mini"] + "{{ raise_exception('Roles must alternate here') }}"
    assert detect(template, MINI, "x")[0] == "phi4-mini"


def test_a_vocabulary_without_the_formats_tokens() -> None:
    with pytest.raises(CheckpointError, match=r"x: the vocabulary lacks <\|tool\|>"):
        detect(TEMPLATES["phi4-mini"], ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "x")
