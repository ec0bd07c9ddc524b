# SPDX-License-Identifier: Apache-2.0
"""Which of the known prompt formats a checkpoint's chat template is.

A template is a program in Jinja; it is recognised by what stands in it and never run. One that says more
than its format does (a built-in system prompt, say) would be rendered wrongly, so it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ..runtime.errors import CheckpointError
from ..runtime.spec import CHAT_FORMATS, ChatFormat

_MAX_CHARS = 1 << 16  # the largest known one has 2 KB
_IDENTITY = "Your name is Phi, an AI math expert developed by Microsoft."  # of Phi-4-mini-reasoning
_TOKENS: dict[ChatFormat, tuple[str, ...]] = {
    "phi4-mini": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>"),
    "phi4-mini-reasoning": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "phi3.5": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
# A line end right after a role's token, in one string or in the next: '<|user|>\n', '<|user|>' + '\n'.
_LINE_END_AFTER_ROLE = re.compile(r"""<\|user\|>(?:['"]\s*\+\s*['"])?(?:\\n|\n)""")
_ROLE_IN_MARKS = re.compile(r"""['"]<\|['"]\s*\+\s*message(?:\[['"]role['"]\]|\.role)\s*\+\s*['"]\|>""")
_STRING = re.compile(r"""'([^']*)'|"([^"]*)\"""")
_RAISE = re.compile(r"raise_exception\([^)]*\)")
_PROSE = re.compile(r"(?<![A-Za-z])[A-Za-z]+(?:[ ,]+[A-Za-z]+){2,}")  # three words in a row


def detect(chat_template: str | None, added_tokens: Collection[str], where: str) -> tuple[ChatFormat, str]:
    """The chat format, and the token that opens the turn of a tool's result.

    Args:
        chat_template: Jinja text from `chat_template.jinja` or tokenizer_config.json, None if there is none.
        added_tokens: contents of the vocabulary's added tokens.
        where: the file, for messages.

    Raises:
        CheckpointError: no template, one that is not known, or a vocabulary that lacks its tokens.
    """
    found = None if chat_template is None else _recognise(chat_template)
    if chat_template is None or found is None:
        what = (
            "there is no chat template"
            if chat_template is None
            else "the chat template is not one that is known"
        )
        raise CheckpointError(f"{where}: {what}: name the format with --chat-format {'|'.join(CHAT_FORMATS)}")
    check_tokens(found, added_tokens, where)
    return found, tool_result_token(chat_template, added_tokens)


def check_tokens(chat_format: ChatFormat, added_tokens: Collection[str], where: str) -> None:
    """Check that a vocabulary has the control tokens of a format.

    Raises:
        CheckpointError: it lacks one.
    """
    for token in _TOKENS[chat_format]:
        if token not in added_tokens:
            raise CheckpointError(
                f"{where}: the vocabulary lacks {token}, which the {chat_format} format needs"
            )


def tool_result_token(chat_template: str | None, added_tokens: Collection[str]) -> str:
    """What opens a tool's result: `<|tool_response|>` where the template names it, else `<|tool|>`."""
    named = chat_template is not None and "<|tool_response|>" in chat_template
    return "<|tool_response|>" if named and "<|tool_response|>" in added_tokens else "<|tool|>"


def _recognise(template: str) -> ChatFormat | None:
    if len(template) > _MAX_CHARS:
        return None
    own_words = [
        text
        for text in ("".join(pair) for pair in _STRING.findall(_RAISE.sub("", template)))
        if _PROSE.search(text.replace(_IDENTITY, ""))
    ]
    if own_words:
        return None
    if "<|im_start|>" in template and "<|im_sep|>" in template and "<|im_end|>" in template:
        return "phi4"
    if "<|end|>" not in template:
        return None
    if _IDENTITY in template:
        return "phi4-mini-reasoning"
    if _LINE_END_AFTER_ROLE.search(template):
        return "phi3.5"
    if _ROLE_IN_MARKS.search(template) and "<|tool|>" in template:
        return "phi4-mini"
    return None
