"""The page at /raee where something is refused, in a browser; an application stands for vLLM."""

import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import uvicorn
from playwright.sync_api import expect
from starlette.responses import JSONResponse
from starlette.routing import Route

from raee_serve.explanation import Neighbour
from raee_serve.server.access import Access
from tests.server.browser import chromium, watched
from tests.unit import serving

pytestmark = pytest.mark.server

MARKUP = "<img src=x onerror='window.ran = 1'>"
HEADS = re.compile("Failed to load resource")
"""What Chromium's console says of every answer that is an error."""


class Application(serving.Server):
    """Answers with markup; its look-ups find rows of such names."""

    def __init__(self, **options):
        super().__init__(**options)
        self.app.routes.append(Route("/v1/models", self.models))

    async def models(self, _):
        return JSONResponse({"data": [{"id": f"model {MARKUP}"}]})

    async def respond(self, body, prompts, client):
        return JSONResponse({"choices": [{"text": f" {MARKUP}"}], "usage": {}})

    def decide(self, lookups):
        row = Neighbour(MARKUP, 0.25, MARKUP)
        return [
            replace(decision, explanation=replace(decision.explanation, neighbours=(row,)))
            if decision.explanation
            else decision
            for decision in super().decide(lookups)
        ]


@contextmanager
def listening(application):
    """Its origin; it listens on a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(application.app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser):
    page = browser.new_page()
    yield page
    page.close()


def ask(page, text):
    page.locator("#task").select_option("sst2")
    page.locator("#text").fill(text)
    page.keyboard.press("Control+Enter")


def test_the_key_is_asked_for_and_kept_in_the_tab_alone(page):
    error, key = page.locator("#error"), page.locator("#key")
    with listening(Application(api_key="secret")) as origin:
        page.goto(f"{origin}/raee")
        expect(error).to_have_text("The server wants an API key.")
        expect(key).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(error).to_have_text("The server does not accept this API key.")
        key.fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#server")).to_contain_text("30 layers")
        expect(error).to_be_hidden()
        ask(page, "a film")
        expect(page.locator("#status")).to_contain_text("Done: 5 of 30 layers")
        assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert page.url == f"{origin}/raee"


def test_no_name_label_or_answer_is_markup(page):
    seen = watched(page)
    with listening(Application()) as origin:
        page.goto(f"{origin}/raee")
        ask(page, MARKUP)
        expect(page.locator("#status")).to_contain_text("Done")
        for place in ("#server", "#chosen .said", "#full .said", "#neighbours code"):
            expect(page.locator(place)).to_contain_text(MARKUP)
        assert page.locator("#neighbours td").all_inner_texts()[1] == MARKUP
        assert page.evaluate("window.ran") is None
        assert page.locator("main img").count() == 0
    assert all(HEADS.match(complaint) for complaint in seen.complaints)


def test_a_server_that_does_not_explain_still_shows_the_depth(page):
    with listening(Application(access=Access(frozenset({"explain", "preview"})))) as origin:
        page.goto(f"{origin}/raee")
        ask(page, "a film")
        expect(page.locator("#status")).to_contain_text("Done: 5 of 30 layers")
        expect(page.locator("#neighbours")).to_contain_text("does not explain")
        assert page.locator("#stack .slab.run").count() == 5
        assert page.locator("#stack .bar").count() == 0


def test_what_the_server_refuses_is_told_in_its_words(page):
    with listening(Application(access=Access(max_body_bytes=500))) as origin:
        page.goto(f"{origin}/raee")
        ask(page, "x" * 1000)
        expect(page.locator("#error")).to_have_text(
            "the body has more than 500 bytes (--max-body-bytes)"
        )
        ask(page, "a film")
        expect(page.locator("#status")).to_contain_text("Done")
        expect(page.locator("#error")).to_be_hidden()


def test_a_server_that_is_gone(page):
    with listening(Application()) as origin:
        page.goto(f"{origin}/raee")
        expect(page.locator("#server")).to_contain_text("30 layers")
    ask(page, "a film")
    expect(page.locator("#error")).to_have_text("The server does not answer. Is it still running?")
