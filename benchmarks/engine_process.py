"""An engine in a process of its own, asked over its standard input and output."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import psutil

Job = dict[str, Any]

TO_LOG = {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""Standard output is for answers."""


CPU_DEFAULTS = {
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""All cores to the worker, and huge pages where the kernel gives them to those who ask."""


def cpu_environment() -> dict[str, str]:
    """Of engines on a CPU: the model runner of ours, and what is fastest for every system unless
    the environment says otherwise."""
    chosen = {name: os.environ.get(name, default) for name, default in CPU_DEFAULTS.items()}
    return {"VLLM_USE_V2_MODEL_RUNNER": "0", **chosen}


class EngineError(RuntimeError):
    """An engine that ended or gave no answer; the message has the end of its log."""


class EngineProcess:
    """A child that takes engine arguments and then jobs, a JSON line each, and answers each.

    It is starting as soon as this is made; `ready` waits for it.
    """

    def __init__(
        self,
        name: str,
        engine: Mapping[str, Any],
        options: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        command: Sequence[str] = ("benchmarks.engine_child",),
        log: Path | None = None,
    ) -> None:
        """engine: arguments of vLLM's. options: the extension's, empty for vanilla vLLM; `engine`
        goes over them.

        command: the child's module and arguments. log: file that keeps what it says.
        """
        self.name = name
        vanilla = {} if options else {"VLLM_PLUGINS": ""}
        self._log = open(log, "w+") if log else tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **TO_LOG, **environment, **vanilla},
        )
        self._lines: Queue[str | None] = Queue()
        Thread(target=self._read, daemon=True).start()
        self._send({**options, **engine})

    def ready(self, timeout_s: float | None = None) -> Job:
        """What it says of itself once it is up. Raises `EngineError`."""
        return self._answered(timeout_s)

    def ask(self, job: Job, timeout_s: float | None = None) -> Job:
        """Its answer to a job. Raises `EngineError`."""
        self._send(job)
        return self._answered(timeout_s)

    def close(self) -> None:
        """End it with all its children."""
        processes = self.processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=30)
        self._process.wait()
        self._log.close()

    def processes(self) -> list[psutil.Process]:
        """Itself and all its children that are alive."""
        if self._process.poll() is not None:
            return []
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def _answered(self, timeout_s: float | None) -> Job:
        answer = self._answer(timeout_s)
        if answer is None:
            raise self._error(f"gave no answer within {timeout_s:.0f} s")
        return answer

    def _answer(self, timeout_s: float | None = None) -> Job | None:
        """The answer to the job sent, or `None` if there is none within the time."""
        try:
            while (line := self._lines.get(timeout=timeout_s)) is not None:
                if line.startswith("ANSWER"):
                    return json.loads(line.removeprefix("ANSWER"))
        except Empty:
            return None
        raise self._error("ended early")

    def _error(self, what: str) -> EngineError:
        self._log.flush()
        self._log.seek(0)
        return EngineError(f"{self.name} {what}:\n{self._log.read()[-3000:]}")

    def _send(self, job: Job) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which waiting for the answer tells
            print(json.dumps(job), file=self._process.stdin, flush=True)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)
