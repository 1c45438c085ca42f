"""The engines that are compared: vanilla vLLM on whole and cut checkpoints, and this."""

import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine_process import EngineProcess, Job, cpu_environment

ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 1 << 29,
    "skip_tokenizer_init": True,
}
"""The same for every system. Eager is vanilla's best on CPU: compiled runs no faster there. A
tokenizer, which nothing needs, takes a gigabyte of each system with Gemma's vocabulary."""

SLICE_S = 0.4
"""How long one system runs before it is another one's turn."""


class System(EngineProcess):
    """An engine process that is stopped, not just idle, while another one is timed."""

    def __init__(self, name: str, checkpoint: Path, dtype: str, options: dict[str, Any]) -> None:
        """options: the extension's engine options, empty for vanilla vLLM."""
        engine = {"model": str(checkpoint), "dtype": dtype, **ENGINE_ARGS}
        super().__init__(name, engine, options, cpu_environment())
        ready = self.ready()
        self.startup_s: float = ready["startup_s"]
        self.vocab_size: int = ready["vocab_size"]
        self._tree = self.processes()
        self._signal(signal.SIGSTOP)

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

    def _signal(self, number: int) -> None:
        for process in self._tree:
            process.send_signal(number)


def run_side_by_side(jobs: Mapping[str, Sequence[tuple[System, Job]]]) -> dict[str, float]:
    """Seconds that the jobs of each name took together, the other systems standing still.

    Systems take turns of `SLICE_S`, so that whatever else slows the machine for longer than that
    slows all of them alike. A system with several jobs takes them one after the other, every other
    system the last one first, so that no name has all of its jobs early.
    """
    queues: dict[System, deque[tuple[str, Job]]] = {}
    for name, parts in jobs.items():
        for system, job in parts:
            queues.setdefault(system, deque()).append((name, job))
    for queue in list(queues.values())[1::2]:
        queue.reverse()
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
