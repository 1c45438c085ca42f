"""The engines that are compared: vanilla vLLM on whole and cut checkpoints, and this."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
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
        ready = self._ask({"model": str(checkpoint), "dtype": dtype, **ENGINE_ARGS, **options})
        self.startup_s: float = ready["startup_s"]
        self.vocab_size: int = ready["vocab_size"]
        self._signal(signal.SIGSTOP)

    def seconds(self, job: dict[str, Any]) -> float:
        """Run a job while every other system stands still; wall-clock seconds."""
        self._signal(signal.SIGCONT)
        try:
            return self._ask(job)["seconds"]
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        for process in self._tree():
            process.kill()
        self._process.wait()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER"):
                return json.loads(line.removeprefix("ANSWER"))
        self._log.seek(0)
        raise RuntimeError(f"{self.name} ended early:\n{self._log.read()[-3000:]}")

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def _signal(self, number: int) -> None:
        for process in self._tree():
            process.send_signal(number)
