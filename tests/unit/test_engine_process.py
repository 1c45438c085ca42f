"""How a benchmark speaks with an engine's process; the engine here is a few lines."""

import json
import subprocess

import psutil
import pytest

from benchmarks.engine_process import EngineError, EngineProcess

pytestmark = pytest.mark.unit


def child():
    """Says what it was started with; then answers, is silent, or fails, as it is told."""
    sleeper = subprocess.Popen(["sleep", "600"])
    print("ANSWER" + json.dumps(json.loads(input()) | {"sleeper": sleeper.pid}), flush=True)
    while job := json.loads(input()):
        if "fail" in job:
            sleeper.kill()
            raise SystemExit(job["fail"])
        print("something else that a library prints")
        if "silent" not in job:
            print("ANSWER" + json.dumps(job), flush=True)


@pytest.fixture
def engine():
    command = ("tests.unit.test_engine_process",)
    engine = EngineProcess("vanilla", {"model": "m"}, {}, {}, command=command)
    yield engine
    engine.close()


def test_it_answers_each_job_and_ends_with_all_its_children(engine):
    ready = engine.ready()
    assert ready["model"] == "m"
    assert engine.ask({"a": 1}) == {"a": 1}
    assert engine.ask({"a": 2}, timeout_s=60) == {"a": 2}
    sleeper = psutil.Process(ready["sleeper"])
    engine.close()
    assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE


def test_what_it_said_last_is_in_the_error(engine):
    engine.ready()
    with pytest.raises(EngineError, match=r"vanilla ended early:\n(.|\n)*no such kernel"):
        engine.ask({"fail": "no such kernel"})


def test_no_answer_in_time_is_an_error(engine):
    engine.ready()
    with pytest.raises(EngineError, match="gave no answer within 1 s"):
        engine.ask({"silent": True}, timeout_s=1)


if __name__ == "__main__":
    child()
