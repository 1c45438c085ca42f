"""Servers as child processes: started on a free port, stopped with all their children."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from raee_serve.errors import RaeeError

LOG_TAIL_CHARS = 4000
STOP_TIMEOUT_S = 30.0
VANILLA_ENVIRONMENT = {"VLLM_PLUGINS": "", "VLLM_USE_V2_MODEL_RUNNER": "0"}
"""Of vLLM's own server: our plug-in does not load, and the model runner is that of ours on CPU."""


class ServerStartError(RaeeError):
    """The server ended, or was not healthy in time; the message carries the end of its log."""


@contextmanager
def running_server(
    model: str, flags: Sequence[str], *, log: Path | None = None, start_timeout_s: float = 600.0
) -> Iterator[str]:
    """Run `raee-serve serve MODEL FLAGS` and yield its base URL once /health is green.

    log: file for its output; by default one that is deleted afterwards.
    Raises ServerStartError.
    """
    command = raee_command(model, flags)
    with running_process(command, log=log, start_timeout_s=start_timeout_s) as (url, _):
        yield url


@contextmanager
def running_process(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    log: Path | None = None,
    start_timeout_s: float = 600.0,
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """As `running_server`, of any command that takes vLLM's --host and --port.

    environment: beside this process's own. Also yields the process, the leader of a group of its
    own that holds all its children.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="raee-serve-") as scratch:
        path = log or Path(scratch) / "server.log"
        with path.open("wb") as sink:
            process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**_environment(), **(environment or {})},
                start_new_session=True,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, url, path, start_timeout_s)
            yield url, process
        finally:
            _stop(process)


def raee_command(model: str, flags: Sequence[str]) -> list[str]:
    """Starts raee-serve."""
    return [sys.executable, "-m", "raee_serve.cli", "serve", model, *flags]


def vanilla_command(checkpoint: Path, model: str, flags: Sequence[str]) -> list[str]:
    """Starts vLLM's own server. model: the name by which requests ask for it."""
    # Not `vllm serve`: that command needs a package named vllm, which the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return [*command, "--model", str(checkpoint), "--served-model-name", model, *flags]


@contextmanager
def standing_still(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """While open, the process and its children run only where it is `awake`."""
    with _signalled(process, signal.SIGSTOP, signal.SIGCONT):  # stopped, it could not be ended
        yield


@contextmanager
def awake(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Of a process that stands still otherwise."""
    with _signalled(process, signal.SIGCONT, signal.SIGSTOP):
        yield


@contextmanager
def _signalled(
    process: subprocess.Popen[bytes], first: signal.Signals, last: signal.Signals
) -> Iterator[None]:
    os.killpg(process.pid, first)
    try:
        yield
    finally:
        os.killpg(process.pid, last)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment() -> dict[str, str]:
    """A small KV cache is enough here, and leaves memory for other processes; CPU only."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}


def _wait_until_healthy(
    process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerStartError(
                f"the server ended with exit code {process.returncode}; its log ends:\n{_tail(log)}"
            )
        if _is_healthy(url):
            return
        time.sleep(0.2)
    raise ServerStartError(
        f"the server was not healthy after {timeout_s:.0f} s; its log ends:\n{_tail(log)}"
    )


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-LOG_TAIL_CHARS:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to stop; after STOP_TIMEOUT_S kill it. Its engine goes with it either way."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):  # engine processes that outlived their parent
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
