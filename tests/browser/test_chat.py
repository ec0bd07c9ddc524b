# SPDX-License-Identifier: Apache-2.0
"""Talking through the page: what it shows is what the Python API answers, and what was said stays."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import Browser, expect

from pocketphi.runtime.engine import Model

from ..scoring import EVAL
from ..serve.served import FRANCE, Server
from .scripts import BREAK_OUT, SLOW_STORE
from .sent import pictures, reply_to, words
from .talk import CHAT, LONG_MS, Talk, endless

if TYPE_CHECKING:
    from .conftest import OpenPage

CAPITAL = FRANCE[0]["content"]
LEGS = "How many legs does a spider have?"
PICTURE = EVAL / "images/img-012.png"
TOOLS = [
    {
        "name": "alarm",
        "description": "Set an alarm",
        "parameters": {"hour": {"type": "int"}, "day": {"type": "str"}},
    }
]


def test_a_text_turn(talk: Talk, alone: Model) -> None:
    talk.send(CAPITAL)
    reply = alone.chat(FRANCE)
    assert talk.answer() == reply.text == "The capital of France is Paris."
    found = talk.timings()
    assert reply.mode in found and f"{reply.timings.predicted_n} tokens" in found
    expect(talk.box).to_have_value("")
    expect(talk.page.locator("#welcome")).to_be_hidden()


def test_turns_follow_one_another(talk: Talk, alone: Model) -> None:
    talk.send(CAPITAL)
    first = talk.answer()
    talk.send(LEGS)
    second = talk.answer(1)
    body = talk.bodies()[1]
    assert [(one["role"], words(one)) for one in body["messages"]] == [
        ("user", CAPITAL),
        ("assistant", first),
        ("user", LEGS),
    ]
    assert second == reply_to(body, alone).text


def test_settings_are_asked_with(talk: Talk, alone: Model) -> None:
    talk.set(System_prompt="You are a helpful assistant.", Temperature="0", Longest_answer="3")
    talk.send(CAPITAL)
    found = talk.answer()
    (body,) = talk.bodies()
    assert (body["max_tokens"], body["temperature"], body["messages"][0]["role"]) == (3, 0, "system")
    assert found == reply_to(body, alone).text.strip() != "The capital of France is Paris."
    assert "longest answer" in talk.timings()


def test_stop(talk: Talk, server: Server) -> None:
    """The server ends the generation too, the text stays, and the next answer is whole."""
    before = server.metric("pocketphi_cancelled_running_total")
    talk.page.route("**" + CHAT, endless, times=1)
    talk.send(CAPITAL)
    written = talk.answers.first.locator(".text")
    expect(written).to_contain_text(re.compile("\\w{2}"), timeout=LONG_MS)
    expect(talk.button("Send")).to_be_hidden()
    talk.button("Stop").click()
    kept = talk.answer(state="stopped")
    assert len(kept) > 2 and "stopped" in talk.timings()
    expect(talk.button("Stop")).to_be_hidden()
    server.until(lambda: server.metric("pocketphi_cancelled_running_total") == before + 1)
    server.until(lambda: server.metric("pocketphi_requests_running") == 0)
    assert (written.text_content() or "").strip() == kept
    talk.button("New conversation").click()
    talk.page.locator("#confirm-yes").click()
    expect(talk.answers).to_have_count(0)
    talk.send(CAPITAL)
    assert talk.answer() == "The capital of France is Paris."


def test_reload(talk: Talk, alone: Model) -> None:
    """The conversation is there again with its picture, which is sent with the next question."""
    talk.attach(PICTURE)
    talk.send("What does the text say?")
    first = talk.answer()
    talk.page.reload()
    talk.until_status("Ready")
    assert talk.answer() == first == "It says chair."
    expect(talk.asked.first.locator(".text")).to_have_text("What does the text say?")
    shown = talk.asked.first.locator("img")
    assert shown.evaluate("(img) => img.decode().then(() => img.naturalWidth)") == 448
    talk.send("Describe the image.")
    second = talk.answer(1)
    body = talk.bodies()[1]
    assert pictures(body["messages"][0]) == [PICTURE.read_bytes()]
    assert second == reply_to(body, alone).text


def test_a_question_that_cannot_be_answered(talk: Talk, tmp_path: Path) -> None:
    """It fails with the server's reason, and is put back into the message to be changed."""
    talk.expected += ["422"]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    talk.attach(broken)
    talk.send(CAPITAL)
    talk.answer(state="failed")
    expect(talk.answers.first.locator(".error")).not_to_be_empty()
    talk.answers.first.get_by_role("button", name="Edit").click()
    expect(talk.answers).to_have_count(0)
    expect(talk.box).to_have_value(CAPITAL)
    talk.button("Remove broken.png").click()
    talk.send()
    assert talk.answer() == "The capital of France is Paris."


def test_ready_means_ready(open_page: OpenPage, browser: Browser, server: Server) -> None:
    """Also where the browser takes its time: nothing that is pressed then is lost."""
    talk = open_page(browser, server, wait=False, script=SLOW_STORE)
    talk.until_status("Ready")
    talk.send(CAPITAL)
    assert talk.answer() == "The capital of France is Paris."


def test_a_second_tab(talk: Talk) -> None:
    """It does not mix its conversation into that of the first."""
    talk.send(CAPITAL)
    talk.answer()
    with talk.page.context.new_page() as second:
        second.goto(talk.url)
        expect(second.locator("#notice")).to_contain_text("another tab", timeout=LONG_MS)
        expect(second.locator("li.message")).to_have_count(0)
    expect(talk.answers).to_have_count(1)


def test_a_new_conversation(talk: Talk) -> None:
    talk.send(CAPITAL)
    talk.answer()
    talk.button("New conversation").click()
    talk.page.locator("#confirm-no").click()
    expect(talk.answers).to_have_count(1)
    talk.button("New conversation").click()
    talk.page.locator("#confirm-yes").click()
    expect(talk.answers).to_have_count(0)
    talk.page.reload()
    talk.until_status("Ready")
    expect(talk.answers).to_have_count(0)


def test_export(talk: Talk, tmp_path: Path) -> None:
    talk.attach(PICTURE)
    talk.send("What does the text say?")
    talk.answer()
    talk.send(CAPITAL)
    second = talk.answer(1)
    for name in ("Markdown", "JSON"):
        with talk.page.expect_download(timeout=LONG_MS) as saved:
            talk.button(f"Export {name}").click()
        saved.value.save_as(tmp_path / name)
    markdown = (tmp_path / "Markdown").read_text("utf-8")
    said = ["What does the text say?", "It says chair.", CAPITAL, second]
    places = [markdown.find(one) for one in said]
    assert -1 not in places and places == sorted(places)
    assert "img-012.png" in markdown
    found = json.loads((tmp_path / "JSON").read_text("utf-8"))
    messages = found["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"] * 2
    assert [words(one) for one in messages] == said
    assert pictures(messages[0]) == [PICTURE.read_bytes()]


def test_a_tool_call(talk: Talk, alone: Model) -> None:
    """Folded, with its arguments; the answer goes on with the result."""
    talk.set(System_prompt="You have some tools.", Tools=json.dumps(TOOLS))
    talk.send("Wake me up at 9 on Saturday.")
    talk.answer()
    call = talk.answers.first.locator("details.tool-call")
    expect(call).to_have_count(1)
    expect(call).not_to_have_attribute("open", "")
    summary = call.locator("summary")
    expect(summary).to_contain_text("alarm")
    result = call.get_by_role("textbox", name="Result")
    expect(result).to_be_hidden()
    summary.click()
    assert json.loads(call.locator("pre").inner_text()) == {"hour": 9, "day": "Saturday"}
    result.fill("Alarm set.")
    call.get_by_role("button", name="Send result").click()
    second = talk.answer(1)
    body = talk.bodies()[1]
    made, given = body["messages"][-2:]
    assert (given["role"], given["content"]) == ("tool", "Alarm set.")
    assert given["tool_call_id"] == made["tool_calls"][0]["id"]
    assert second == reply_to(body, alone).text.strip() != ""


HOSTILE = """Look: <img src=x onerror="document.title='taken'"> <script>document.title='taken'</script>
[a link](javascript:document.title='taken') ![a picture](https://example.org/seen.png) **bold** and `code`
"""


def chunk(**delta: str) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) + "\n\n"


def test_an_answer_is_never_markup(talk: Talk) -> None:
    """What a model may say, but phi4-nano never does: thoughts, and text that wants to be a page."""
    stream = chunk(reasoning_content="<b>First</b> I think.") + chunk(content=HOSTILE) + "data: [DONE]\n\n"
    talk.page.route(
        "**" + CHAT, lambda route: route.fulfill(body=stream, content_type="text/event-stream"), times=1
    )
    talk.send("Show me.")
    found = talk.answer()
    answer = talk.answers.first
    assert '<img src=x onerror="' in found and "<script>" in found
    assert answer.locator("img, script, iframe, b").count() == 0
    for link in answer.locator("a").all():
        assert re.match("https?:", link.get_attribute("href") or "")
    thoughts = answer.locator("details.thoughts")
    expect(thoughts).not_to_have_attribute("open", "")
    expect(thoughts.locator(".thought")).to_be_hidden()
    thoughts.locator("summary").click()
    expect(thoughts.locator(".thought")).to_have_text("<b>First</b> I think.")
    assert talk.page.title() == "pocketphi"


def test_the_policy_holds(open_page: OpenPage, browser: Browser, server: Server) -> None:
    """A script that got into the page all the same does not run, and nothing can be sent elsewhere."""
    talk = open_page(browser, server)
    talk.expected += ["Content Security Policy", "TrustedScript", "Trusted Type"]
    left = talk.page.evaluate(BREAK_OUT)
    assert (talk.page.title(), left) == ("pocketphi", "TypeError")
    assert any("https://example.org/" in one and "connect-src" in one for one in talk.errors)
    talk.requests[:] = [one for one in talk.requests if one.url != "https://example.org/"]
