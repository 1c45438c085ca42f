"""The OpenAI servers that are compared: vanilla vLLM on whole and cut checkpoints, and this."""

import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.metrics_page import page, samples
from raee_serve.evaluation.server_process import (
    VANILLA_ENVIRONMENT,
    awake,
    raee_command,
    running_process,
    standing_still,
    vanilla_command,
)

SERVE_FLAGS = ("--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", "2048")
"""The same for every system. Eager is vanilla's best on CPU: compiled runs no faster there."""


@dataclass(frozen=True, slots=True)
class Decided:
    """What a server has decided so far. layers: sum of exit layers over `prompts`."""

    prompts: int = 0
    layers: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    def since(self, earlier: "Decided") -> "Decided":
        return Decided(
            self.prompts - earlier.prompts,
            self.layers - earlier.layers,
            self.reasons - earlier.reasons,
        )


@dataclass(frozen=True, slots=True)
class ServedSystem:
    """A running server that stands still (SIGSTOP) but while it is measured."""

    name: str
    url: str
    process: subprocess.Popen[bytes]

    @contextmanager
    def awake(self) -> Iterator[None]:
        with awake(self.process):
            yield

    def decided(self) -> Decided:
        """From its metrics, so while it is awake; nothing for vanilla vLLM."""
        return decided_in(page(self.url))


def decided_in(metrics: str) -> Decided:
    """What a server's `/metrics` say it has decided."""
    prompts, layers, reasons = 0, 0.0, Counter[str]()
    for sample in samples(metrics):
        if sample.name == "raee_exit_layer_sum":
            layers += sample.value
        elif sample.name == "raee_decisions_total":
            prompts += int(sample.value)
            reasons[sample.labels["reason"]] += int(sample.value)
    return Decided(prompts, layers, reasons)


@contextmanager
def vanilla_server(
    name: str, checkpoint: Path, model: str, dtype: str, log: Path
) -> Iterator[ServedSystem]:
    """vLLM without our plug-in. model: the name by which requests ask for it."""
    command = vanilla_command(checkpoint, model, ["--dtype", dtype, *SERVE_FLAGS])
    with started(name, command, VANILLA_ENVIRONMENT, log) as system:
        yield system


@contextmanager
def raee_server(
    model: str, table: str, dtype: str, flags: Sequence[str], log: Path
) -> Iterator[ServedSystem]:
    """flags: further ones of `raee-serve serve`."""
    command = raee_command(model, ["--table", table, "--dtype", dtype, *SERVE_FLAGS, *flags])
    with started("raee-serve", command, {}, log) as system:
        yield system


@contextmanager
def started(
    name: str, command: Sequence[str], environment: dict[str, str], log: Path
) -> Iterator[ServedSystem]:
    """A server that stands still as soon as it is up. command: takes --host and --port."""
    print(f"starting {name} ...", flush=True)
    server = running_process(command, environment, log=log)
    with server as (url, process), standing_still(process):
        yield ServedSystem(name, url, process)
