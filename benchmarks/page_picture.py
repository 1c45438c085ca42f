"""Take a picture of the page at /raee of a running server, with one text asked.

Some of the demo's texts are asked first, so that the live panel has something to show. Needs
chromium on the PATH, and the dev extra for playwright.
"""

import argparse
import asyncio
import shutil
from pathlib import Path

from openai import AsyncOpenAI
from playwright.sync_api import sync_playwright

from raee_serve.evaluation.asking import Asker
from raee_serve.tasks.datasets import load_examples
from raee_serve.tasks.registry import get_task

SIZE = {"width": 1280, "height": 900}
"""Of the window, px; the picture is as high as the page."""
TEXTS = 40
ANSWER_MS = 120_000


async def ask_some(url: str, name: str) -> None:
    """One after another, as a quiet server would be asked."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        models = await client.models.list()
        server = Asker(client, models.data[0].id)
        for example in load_examples(get_task("demo_sentiment"), "test")[:TEXTS]:
            await server.ask(get_task(name), example.text, {})


def take(url: str, task: str, text: str, out: Path) -> None:
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("no chromium on the PATH (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(f"{url}/raee")
        page.locator(f"#task option[value={task}]").wait_for(state="attached")
        page.locator("#task").select_option(task)
        page.locator("#text").fill(text)
        page.keyboard.press("Control+Enter")
        page.locator("#status:has-text('Done')").wait_for(timeout=ANSWER_MS)
        page.locator("#run").focus()
        page.screenshot(path=out, full_page=True)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--task", default="demo_sentiment", help="a task of the server's table")
    parser.add_argument("--text", default="The soup was cold and the waiter was rude.")
    parser.add_argument("--out", type=Path, required=True, metavar="X.png")
    args = parser.parse_args()
    asyncio.run(ask_some(args.url, args.task))
    take(args.url, args.task, args.text, args.out)


if __name__ == "__main__":
    main()
