"""Several processes write to one table and are killed at any moment: it is never corrupt."""

import multiprocessing
import random
import re
import signal

import numpy as np
import pytest

from raee_serve.errors import TableError
from raee_serve.table.records import BINDING, CHANGE, built_id, choice_id, task_id
from raee_serve.table.store import ExitTable
from raee_serve.table.versions import read_records
from tests.unit import writers
from tests.unit.writers import IDS, TASK, TOLD, rows_of

pytestmark = pytest.mark.unit

ROUNDS = 6
LONGEST_LIFE_S = 1.0
NOT_YET = re.compile("no such directory|no LanceDB table|was not found")


@pytest.fixture(scope="module")
def processes():
    """Starts in milliseconds: the server they are forked from has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.writers"])
    return context


def started(processes, *works):
    """Processes at `works`, each the arguments of `writers.run`."""
    all_of_them = [processes.Process(target=writers.run, args=work) for work in works]
    for process in all_of_them:
        process.start()
    return all_of_them


def killed_at_random(running, draw):
    """Their exit codes."""
    for process in draw.sample(running, len(running)):
        process.join(draw.uniform(0, LONGEST_LIFE_S))
        process.kill()
    for process in running:
        process.join()
    return [process.exitcode for process in running]


def check_whole(uri, templates):
    """The table as it is now; None if it has not been created yet."""
    try:
        table = ExitTable.open(uri)
    except TableError as error:
        if NOT_YET.search(str(error)):
            return None
        raise
    records = read_records(table._exits)
    built = {name for name in records if name.startswith(built_id(f"{TASK}/"))}
    assert set(records) - built <= {BINDING, CHANGE, task_id(TASK), choice_id(TASK)}
    assert {BINDING, CHANGE} <= set(records)
    if entry := table.metadata.tasks.get(TASK):
        assert entry.version in templates
        rows = table.rows(TASK)
        assert len(rows.ids) == len(set(rows.ids)) == table.count_rows()
        if rows.ids:
            expected = rows_of(entry.version, rows.ids)
            for name in ("vectors", "golds", "plain_probs", "full_logprobs"):
                np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name))
        if fit := table.fit(TASK):
            assert set(fit.ids) <= set(IDS) and len(set(fit.ids)) == len(fit.ids)
    return table


def test_two_builders_killed_at_random(processes, uri):
    draw, sizes = random.Random(0), [0]
    for _ in range(ROUNDS):
        running = started(processes, *(("build", uri, draw.random()) for _ in range(2)))
        assert set(killed_at_random(running, draw)) <= {0, -signal.SIGKILL}
        if table := check_whole(uri, {"first"}):
            sizes.append(table.count_rows())
    assert sizes == sorted(sizes)  # nothing that was committed is lost
    running = started(processes, *(("build", uri, draw.random()) for _ in range(2)))
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    table = check_whole(uri, {"first"})
    assert sorted(table.rows(TASK).ids) == sorted(table.fit(TASK).ids) == IDS


def test_all_kinds_of_writers_killed_at_random(processes, uri):
    draw, templates = random.Random(1), ["first", "second"]
    writers.build(uri, 0)
    for _ in range(ROUNDS):
        works = [
            ("build", uri, draw.random(), draw.choice(templates)),
            ("replace", uri, draw.random(), draw.choice(templates)),
            ("edit", uri, draw.random()),
        ]
        codes = killed_at_random(started(processes, *works), draw)
        assert set(codes) <= {0, TOLD, -signal.SIGKILL}
        assert check_whole(uri, templates) is not None
        assert ExitTable.open(uri).history()
    for template in templates:
        writers.replace(uri, 1, template)
        table = check_whole(uri, {template})
        assert sorted(table.rows(TASK).ids) == sorted(table.fit(TASK).ids) == IDS
        assert table.count_unseen() == 0 and set(table.metadata.built) == {TASK}
        assert len(read_records(table._exits)) == 4  # binding, change, task, what was built
