"""The page at /raee in a browser, against the server of the other tests."""

import pytest
from playwright.sync_api import expect

from tests.server.browser import chromium, watched
from tests.server.conftest import MODEL, NUM_LAYERS

pytestmark = pytest.mark.server

TASK = "demo_sentiment"
ANSWER_MS = 60_000


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, served):
    """The page, connected. It must complain of nothing, and ask nobody but its server."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    seen = watched(page)
    page.goto(f"{served.url}/raee")
    expect(page.locator("#server")).to_have_text(f"{MODEL}, {NUM_LAYERS} layers")
    yield page
    page.close()
    assert not seen.complaints
    assert not seen.elsewhere(served.url)


def focused(page) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.value")


def done(page) -> None:
    expect(page.locator("#status")).to_contain_text("Done", timeout=ANSWER_MS)


def prompts_counted(page) -> int:
    return int(page.locator("#totals dd").first.inner_text().replace(",", ""))


def explained(served, prompt, **raee):
    """(answer, decision) of the API's own."""
    answer = served.client.completions.create(
        model=MODEL,
        prompt=prompt,
        temperature=0,
        extra_body={"raee": {"task": TASK, "explain": True, **raee}},
    )
    return answer.choices[0].text.strip(), answer.model_extra["raee"]["prompts"][0]


def test_a_text_is_asked_about_by_keyboard_alone(page, served, reviews):
    depths = page.locator("#depths svg")
    expect(depths).to_be_visible()
    before, histogram = prompts_counted(page), depths.get_attribute("aria-label")
    assert focused(page) == "text"
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "completions"
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "task"
    page.keyboard.type(TASK)
    expect(page.locator("#template")).to_contain_text("{text} It was")
    expect(page.locator("#endpoints")).to_be_hidden()
    page.keyboard.press("Tab")
    page.keyboard.type(reviews[0])
    page.keyboard.press("Control+Enter")
    done(page)

    said, decision = explained(served, f"{reviews[0]} It was")
    expect(page.locator("#headline")).to_contain_text(
        f"{decision['exit_layer']} of {NUM_LAYERS} layers"
    )
    facts = page.locator("#facts").inner_text()
    assert decision["reason"] in facts and decision["head"] in facts and TASK in facts
    shown = page.locator("#labels td:first-child").all_inner_texts()
    assert shown == list(decision["labels"])
    assert page.locator("#stack .slab").count() == NUM_LAYERS
    assert page.locator("#stack .slab.run").count() == decision["exit_layer"]
    assert page.locator("#stack .bar").count() == NUM_LAYERS
    full, _ = explained(served, f"{reviews[0]} It was", exit_layer="full")
    assert page.locator("#chosen .said").inner_text() == said
    assert page.locator("#full .said").inner_text() == full
    assert "ms" in page.locator("#chosen").inner_text()

    rows = decision["neighbours"]
    shown = page.locator("#neighbours code")
    assert 0 < shown.count() < len(rows)
    page.locator("#neighbours button").focus()
    page.keyboard.press("Enter")
    assert shown.all_inner_texts() == [row["id"] for row in rows]
    labels = page.locator("#neighbours td:nth-child(2)").all_inner_texts()
    assert labels == [row["label"] for row in rows]

    expect(depths).not_to_have_attribute("aria-label", histogram)
    assert prompts_counted(page) >= before + 2


def test_a_prompt_in_a_template_is_recognised(page, served, reviews):
    page.keyboard.type(f"{reviews[1]} It was")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert focused(page) == "run"
    page.keyboard.press("Enter")
    done(page)
    said, decision = explained(served, f"{reviews[1]} It was")
    expect(page.locator("#status")).to_contain_text(f"Recognised as {TASK}")
    expect(page.locator("#headline strong")).to_have_text(str(decision["exit_layer"]))
    assert page.locator("#chosen .said").inner_text() == said


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_another_prompt_runs_at_full_depth(page, endpoint):
    page.locator(f"input[value={endpoint}]").check()
    page.locator("#max-tokens").fill("3")
    page.locator("#text").fill("What is the capital of France?")
    page.locator("#run").click()
    done(page)
    expect(page.locator("#facts")).to_contain_text("unmatched")
    expect(page.locator("#headline")).to_contain_text(f"{NUM_LAYERS} of {NUM_LAYERS}")
    assert page.locator("#chosen .said").inner_text() == page.locator("#full .said").inner_text()
    expect(page.locator("#neighbours")).to_contain_text("No look-up was made")


def test_markup_in_a_prompt_is_text(page, served):
    markup = "<img src=x onerror='window.ran = 1'><script>window.ran = 1</script>"
    page.locator("#max-tokens").fill("2")
    page.locator("#text").fill(markup)
    page.keyboard.press("Control+Enter")
    done(page)
    assert page.evaluate("window.ran") is None
    assert page.locator("main img, main script").count() == 0


def test_it_fits_a_narrow_screen(page, reviews):
    page.set_viewport_size({"width": 400, "height": 800})
    page.locator("#task").select_option(TASK)
    page.locator("#text").fill(reviews[2])
    page.keyboard.press("Control+Enter")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    widths = page.locator("#stack svg, #depths svg, #lookups svg").evaluate_all(
        "charts => charts.map((chart) => chart.getBoundingClientRect().right)"
    )
    assert len(widths) == 3 and max(widths) <= 400


def test_the_live_panel_pauses_while_the_page_is_hidden(browser, served):
    page = browser.new_page()
    page.clock.install()
    page.goto(f"{served.url}/raee")
    expect(page.locator("#live-state")).to_contain_text("As of")
    asked = []
    page.on("request", lambda request: asked.append(request.url))

    def hide(is_hidden):
        page.evaluate(
            "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, "
            "configurable: true}); document.dispatchEvent(new Event('visibilitychange')); }",
            is_hidden,
        )

    hide(True)
    page.clock.run_for(60_000)
    assert asked == []
    hide(False)
    page.wait_for_event("requestfinished")
    assert asked == [f"{served.url}/metrics"]
    page.close()
