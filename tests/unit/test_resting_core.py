"""An engine core that waits for its workers takes no time from others, and hears every answer."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from raee_serve_patches.resting_core import Rests, rest_while_waiting

pytestmark = pytest.mark.unit

PAUSE_S = 0.05


@pytest.fixture
def queue():
    """Both ends of what workers answer through."""
    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(writer.wait_until_ready)
        reader.wait_until_ready()
        ready.result()
    yield writer, reader
    reader.shutdown()


def cpu_share(writer, reader):
    """Of the time that the reader spends on some answers, each a while after the one before."""

    def answer():
        for number in range(10):
            time.sleep(PAUSE_S)
            writer.enqueue(number)

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(answer)
        wall, own = time.perf_counter(), time.thread_time()
        assert [reader.dequeue(timeout=10) for _ in range(10)] == list(range(10))
        share = (time.thread_time() - own) / (time.perf_counter() - wall)
        answers.result()
    return share


def test_waiting_takes_no_time_from_others(queue):
    writer, reader = queue
    restless = cpu_share(writer, reader)
    rest_while_waiting(SimpleNamespace(response_mqs=[reader]))
    assert cpu_share(writer, reader) < restless / 4


def test_an_answer_without_a_call_is_heard(queue):
    writer, reader = queue
    rest_while_waiting(SimpleNamespace(response_mqs=[reader]))
    writer._spin_condition.notify = lambda: None  # a call may get lost
    cpu_share(writer, reader)


def test_the_longer_an_answer_takes_the_longer_are_the_rests(monkeypatch):
    clock, rests = [0.0], []

    def wait(timeout_ms):
        rests.append(timeout_ms)
        clock[0] += timeout_ms / 1000

    monkeypatch.setattr(
        "raee_serve_patches.resting_core.time", SimpleNamespace(monotonic=lambda: clock[0])
    )
    condition = SimpleNamespace(last_read=-60.0, wait=wait)  # long before the first wait
    own = Rests(condition)
    while clock[0] < 1:
        own.wait(5000)
    assert rests[0] == 1 and rests == sorted(rests) and rests[-1] <= 100
    assert len(rests) < 70
    condition.last_read = clock[0]
    own.wait(5000)
    own.wait(0)
    assert rests[-2:] == [1, 0]
