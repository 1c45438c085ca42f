"""The running server takes up new versions of its table, and no request notices."""

import shutil
import threading

import pytest

from benchmarks.metrics_page import total
from raee_serve.table.build import complete as complete_fit
from raee_serve.table.store import ExitTable
from tests.server.asking import complete, post
from tests.server.conftest import MODEL, ROWS

pytestmark = pytest.mark.server

RELOAD = "/v1/raee/reload"
NAMED = {"task": "demo_sentiment"}
BOTH = {"demo_chat_sentiment": ROWS, "demo_sentiment": ROWS}


@pytest.fixture
def table(served, built_table):
    """The server's table as it was built, loaded; again so afterwards, for the tests to come."""

    def restore():
        shutil.rmtree(served.table, ignore_errors=True)
        shutil.copytree(built_table, served.table)
        status, _, answer = post(served, RELOAD, b"")
        assert (status, answer["new"]["tasks"]) == (200, BOTH)

    restore()
    yield ExitTable.open(str(served.table))
    restore()


def reloads(served, outcome):
    return total(served.url, "raee_table_reloads_total", outcome=outcome)


def test_requests_go_on_while_tables_are_swapped(served, table, reviews):
    before, replies, ended = table.version, [], threading.Event()
    prompts = [f"{text} It was" for text in reviews[:2]]

    def ask():
        while not ended.is_set():
            replies.append(complete(served, prompts, raee=NAMED))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        table.delete_rows(sorted(table.row_ids("demo_sentiment"))[:3])
        complete_fit(table, "demo_sentiment", progress=False)
        table.drop_task("demo_chat_sentiment")
        status, _, answer = post(served, RELOAD, b"")
        assert status == 200
        assert answer["old"] == {"version": before, "rows": 2 * ROWS, "tasks": BOTH}
        fewer = {"demo_sentiment": ROWS - 3}
        assert answer["new"] == {"version": table.version, "rows": ROWS - 3, "tasks": fewer}
        table.rollback(before)
        assert post(served, RELOAD, b"")[2]["new"]["tasks"] == BOTH
    finally:
        ended.set()
        asking.join()
    assert replies and all(reply.reasons == ["retrieved"] * 2 for reply in replies)


def test_every_answer_is_one_of_two_tables_own(served, table, reviews):
    """Also of the requests that are under way while the probes change."""
    prompts = [f"{text} It was" for text in reviews[:3]]
    first, own, replies, ended = table.version, [], [], threading.Event()
    own.append(complete(served, prompts, raee=NAMED))
    table.delete_rows(sorted(table.row_ids("demo_sentiment"))[:20])
    complete_fit(table, "demo_sentiment", progress=False)
    second = table.version
    assert post(served, RELOAD, b"")[0] == 200
    own.append(complete(served, prompts, raee=NAMED))
    assert not same(*own)

    def ask():
        while not ended.is_set():
            replies.append(complete(served, prompts, raee=NAMED))

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    try:
        for version in (first, second) * 4:
            table.rollback(version)
            assert post(served, RELOAD, b"")[0] == 200
    finally:
        ended.set()
        for thread in asking:
            thread.join()
    assert len(replies) > 20
    assert all(same(reply, own[0]) or same(reply, own[1]) for reply in replies)
    assert any(same(reply, own[0]) for reply in replies)
    assert any(same(reply, own[1]) for reply in replies)


def same(one, other):
    """Whether two replies are of the same probes at the same depths, but for bf16 noise."""
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    return one.layers == other.layers and all(
        abs(mine[label] - theirs[label]) < 0.1 for mine, theirs in pairs for label in mine
    )


def test_a_dropped_task_is_gone_after_the_reload(served, table):
    raee = {"task": "demo_chat_sentiment"}
    body = {"model": MODEL, "prompt": "fine", "max_tokens": 1, "raee": raee}
    assert post(served, "/v1/completions", body)[0] == 200
    table.drop_task("demo_chat_sentiment")
    assert post(served, RELOAD, b"")[0] == 200
    status, _, answer = post(served, "/v1/completions", body)
    assert status == 400 and "allowed: demo_sentiment" in answer["error"]["message"]


def test_an_unusable_table_leaves_the_loaded_one(served, table, reviews):
    kept = reloads(served, "kept")
    shutil.rmtree(served.table)
    status, _, answer = post(served, RELOAD, b"")
    error = answer["error"]
    assert (status, error["type"], error["code"]) == (409, "ConflictError", 409)
    assert "stays loaded: the exit table: no such directory" in error["message"]
    assert str(served.table) not in error["message"]
    reply = complete(served, f"{reviews[0]} It was", raee=NAMED)
    assert reply.reasons == ["retrieved"]
    assert reloads(served, "kept") == kept + 1
