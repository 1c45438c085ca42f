"""The engines that are compared: vanilla vLLM on whole and cut checkpoints, and this."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import psutil

ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 1 << 29,
}
"""The same for every system. Eager is vanilla's best on CPU: compiled runs no faster there."""

SLICE_S = 0.4
"""How long one system runs before it is another one's turn."""

Job = dict[str, Any]


class System:
    """An engine process that is stopped, not just idle, while another one is timed."""

    def __init__(self, name: str, checkpoint: Path, dtype: str, options: dict[str, Any]) -> None:
        """options: the extension's engine options, empty for vanilla vLLM."""
        self.name = name
        environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"}
        environment.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        if not options:
            environment["VLLM_PLUGINS"] = ""
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open while it runs
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._lines: Queue[str | None] = Queue()
        Thread(target=self._read, daemon=True).start()
        self._send({"model": str(checkpoint), "dtype": dtype, **ENGINE_ARGS, **options})
        ready = self._answer()
        assert ready is not None
        self.startup_s: float = ready["startup_s"]
        self.vocab_size: int = ready["vocab_size"]
        root = psutil.Process(self._process.pid)
        self._tree = [root, *root.children(recursive=True)]
        self._signal(signal.SIGSTOP)

    def _answer(self, timeout_s: float | None = None) -> Job | None:
        """The answer to the job sent, or `None` if there is none within the time."""
        try:
            while (line := self._lines.get(timeout=timeout_s)) is not None:
                if line.startswith("ANSWER"):
                    return json.loads(line.removeprefix("ANSWER"))
        except Empty:
            return None
        self._log.seek(0)
        raise RuntimeError(f"{self.name} ended early:\n{self._log.read()[-3000:]}")

    def run_for(self, seconds: float, job: Job | None = None) -> tuple[float, bool]:
        """Let it run that long, less if it answers; (seconds it ran, whether it answered).

        job: handed over first; to be given whenever the last one has been answered.
        """
        start = time.perf_counter()
        self._signal(signal.SIGCONT)
        if job is not None:
            self._send(job)
        answered = self._answer(seconds) is not None
        self._signal(signal.SIGSTOP)
        return time.perf_counter() - start, answered

    def close(self) -> None:
        for process in self._tree:
            process.kill()
        self._process.wait()

    def _signal(self, number: int) -> None:
        for process in self._tree:
            process.send_signal(number)

    def _send(self, job: Job) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def run_side_by_side(jobs: Mapping[str, Sequence[tuple[System, Job]]]) -> dict[str, float]:
    """Seconds that the jobs of each name took together, the other systems standing still.

    Systems take turns of `SLICE_S`, so that whatever else slows the machine for longer than that
    slows all of them alike. A system with several jobs takes them one after the other.
    """
    queues: dict[System, deque[tuple[str, Job]]] = {}
    for name, parts in jobs.items():
        for system, job in parts:
            queues.setdefault(system, deque()).append((name, job))
    seconds = dict.fromkeys(jobs, 0.0)
    is_new = dict.fromkeys(queues, True)
    while any(queues.values()):
        for system, queue in queues.items():
            if not queue:
                continue
            name, job = queue[0]
            ran, is_new[system] = system.run_for(SLICE_S, job if is_new[system] else None)
            seconds[name] += ran
            if is_new[system]:
                queue.popleft()
    return seconds
