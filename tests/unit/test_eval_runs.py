"""What an evaluation through a server asks for, and what the demo makes of it."""

import asyncio
from dataclasses import dataclass, field

import httpx
import pytest
from openai import BadRequestError

from raee_serve.evaluation.asking import Answer, Asker
from raee_serve.evaluation.demo import verdict
from raee_serve.evaluation.report import TaskResult
from raee_serve.evaluation.run import WARM_UP, evaluate, full_depth_of
from raee_serve.tasks.datasets import Example
from raee_serve.tasks.registry import get_task

pytestmark = pytest.mark.unit

SENTIMENT = get_task("demo_sentiment")
THROUGH_HEAD = {"exit_layer": "full", "head": "plain"}


@dataclass(frozen=True)
class Scripted(Asker):
    """Is right at layer 5 of 10, and wrong at full depth."""

    takes_plain: bool = True
    asked: list[tuple[str, dict]] = field(default_factory=list)

    async def ask(self, task, text, raee):
        self.asked.append((text, raee))
        if raee.get("head") == "plain" and not self.takes_plain:
            request = httpx.Request("POST", "http://x")
            raise BadRequestError("no", response=httpx.Response(400, request=request), body=None)
        is_full = raee.get("exit_layer") == "full"
        label = task.labels[is_full] if task.labels else "words"
        return Answer(label, 9, 1, 10 if is_full else 5, 10, "retrieved", "-", 0.1)


def test_full_depth_is_the_lm_heads_where_it_can_tell_the_labels_apart():
    assert asyncio.run(full_depth_of(Scripted(None, "m"), SENTIMENT)) == THROUGH_HEAD
    refusing = Scripted(None, "m", takes_plain=False)
    assert asyncio.run(full_depth_of(refusing, SENTIMENT)) == {"exit_layer": "full"}
    free_text = get_task("demo_summary")
    assert asyncio.run(full_depth_of(refusing, free_text)) == {"exit_layer": "full"}


def test_every_row_is_asked_twice_after_others_warmed_up():
    server = Scripted(None, "m")
    rows = [Example(f"text {n}", 0) for n in range(5)]
    found = asyncio.run(
        evaluate(server, [SENTIMENT], {SENTIMENT.name: rows}, {"budget": 0.9}, concurrency=2)
    )[SENTIMENT.name]
    assert (found.full_accuracy, found.raee_accuracy, found.mean_exit_layer) == (0, 1, 5)
    texts = [text for text, _ in server.asked]
    assert set(texts[: 1 + 2 * len(WARM_UP)]) == set(WARM_UP)
    assert [texts.count(row.text) for row in rows] == [2] * 5
    assert server.asked[-1] == ("text 4", {"budget": 0.9})


def test_the_demos_last_lines_say_what_was_gained():
    result = TaskResult(60, "accuracy", 0.9, 0.95, 6.5, 18, 30.0, 45.0, {})
    assert verdict(result) == (
        "6.5 of 18 layers (shallower), accuracy 0.950 against 0.900 at full depth "
        "(at least as right), 45.0 against 30.0 requests/s (faster)"
    )
    result = TaskResult(60, "accuracy", 0.9, 0.85, 18.0, 18, 30.0, 29.0, {})
    said = verdict(result)
    assert all(part in said for part in ("(not shallower)", "(less right)", "(not faster)"))
