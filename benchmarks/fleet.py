"""The engines of one shape on one device, as many side by side as its memory holds."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.deadline import Deadline, OutOfTime
from benchmarks.depths import six_depths
from benchmarks.engine_process import EngineProcess, Job
from benchmarks.shapes import Shape
from raee_serve.engine.settings import engine_options

KV_TOKENS = 20_480
"""In each engine's KV cache: two steps of prompts, and more than 64 requests that decode."""
OVERHEAD_BYTES = 3 << 30
"""Of an engine beside weights and KV cache: context, activations, graphs."""
ENGINE_ARGS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 64,
    # Says only how much has to be free at the start: the KV cache has a size of its own.
    "gpu_memory_utilization": 0.01,
}
"""The same for every engine; all else is vLLM's default."""


@dataclass(frozen=True, slots=True)
class Machinery:
    """What engines are started with, whatever their model.

    environment: of their processes. memory_bytes: of the device, for all of them together.
    settings: arguments of both sides, for those that are vLLM's own choice by default. logs:
    directory that keeps what they say.
    """

    workdir: Path
    environment: Mapping[str, str]
    memory_bytes: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    logs: Path | None = None

    def start(
        self, name: str, engine: Job, exit_points: Sequence[int] | None = None
    ) -> EngineProcess:
        """An engine that is starting: vanilla vLLM, or this where it has exit points."""
        options = {} if exit_points is None else engine_options(exit_points=exit_points)
        log = None if self.logs is None else self.logs / f"{name.replace(' ', '-')}.log"
        return EngineProcess(name, {**engine, **self.settings}, options, self.environment, log=log)


class Fleet:
    """Vanilla and this at full depth, and vanilla on cut shapes, which come and go.

    An engine that is not asked waits without using the device. seeds: of rounds, never used twice.
    """

    def __init__(self, shape: Shape, machinery: Machinery, deadline: Deadline) -> None:
        self.shape, self.deadline = shape, deadline
        self.startup_s: dict[str, float] = {}
        self.seeds = count()
        self._machinery = machinery
        self._vanilla: dict[int, EngineProcess] = {}
        self._ours: EngineProcess | None = None

    @property
    def depths(self) -> Collection[int]:
        """At which vanilla is running."""
        return self._vanilla.keys()

    def bring(self, depths: Sequence[int]) -> None:
        """Have vanilla run at the first of `depths`, as many as fit beside each other.

        The first time vanilla and this at full depth are started as well, all side by side. Raises
        `OutOfTime` where that would take too long, `EngineError` for an engine that does not start.
        """
        full = self.shape.num_layers
        room = self._machinery.memory_bytes - self._bytes(full)  # which is this engine's
        wanted = fitting(list(dict.fromkeys([full, *depths])), room, self._bytes)
        new = [depth for depth in wanted if depth not in self._vanilla]
        if not new:
            return
        if self.deadline.left_s < max(self.startup_s.values(), default=1.0):
            raise OutOfTime
        for depth in superfluous(list(self._vanilla), wanted, room, self._bytes):
            self._vanilla.pop(depth).close()
        self._start(new)

    def seconds(self, depth: int, job: Job) -> float:
        """Of a run by vanilla at a depth. Raises `EngineError`."""
        return self._asked(self._vanilla[depth], job)

    def our_seconds(self, job: Job) -> float:
        """Of a run by this. Raises `EngineError`."""
        assert self._ours is not None
        return self._asked(self._ours, job)

    def close(self) -> None:
        for engine in (*self._vanilla.values(), self._ours):
            if engine is not None:
                engine.close()

    def _start(self, depths: Sequence[int]) -> None:
        name = self.shape.name
        for depth in depths:
            what = f"{name} vanilla {depth} layers"
            self._vanilla[depth] = self._machinery.start(what, self._engine(depth))
        starting = [self._vanilla[depth] for depth in depths]
        if self._ours is None:
            full = self.shape.num_layers
            points = six_depths(full)
            self._ours = self._machinery.start(f"{name} raee-serve", self._engine(full), points)
            starting.append(self._ours)
        print(f"starting {', '.join(engine.name for engine in starting)} ...", flush=True)
        for engine in starting:
            ready = engine.ready(max(1.0, self.deadline.left_s))
            self.startup_s[engine.name] = round(ready["startup_s"], 1)

    def _engine(self, depth: int) -> Job:
        """Arguments of an engine with the first `depth` layers and dummy weights."""
        model = self._machinery.workdir / f"{self.shape.name}-{depth}"
        if not model.is_dir():
            self.shape.write(depth, model)
        return {
            "model": str(model),
            "dtype": self.shape.dtype,
            "kv_cache_memory_bytes": self.shape.kv_bytes(depth, KV_TOKENS),
            **ENGINE_ARGS,
        }

    def _bytes(self, depth: int) -> int:
        """That an engine takes of the device."""
        own = self.shape.weight_bytes(depth) + self.shape.kv_bytes(depth, KV_TOKENS)
        return own + OVERHEAD_BYTES

    def _asked(self, engine: EngineProcess, job: Job) -> float:
        return engine.ask(job, max(PATIENCE_S, self.deadline.left_s))["seconds"]


PATIENCE_S = 20.0
"""For the answer to a job that was begun in time."""


def fitting(wanted: Sequence[int], room: float, size: Callable[[int], float]) -> list[int]:
    """The first of `wanted` that have room together, and two in any case: vanilla at full depth,
    which is the first, and what is compared with it."""
    chosen: list[int] = []
    for depth in wanted:
        if len(chosen) >= 2 and sum(map(size, [*chosen, depth])) > room:
            break
        chosen.append(depth)
    return chosen


def superfluous(
    running: Sequence[int], wanted: Sequence[int], room: float, size: Callable[[int], float]
) -> list[int]:
    """Of what is running and not wanted, the oldest, as many as have to go."""
    left, going = list(dict.fromkeys([*running, *wanted])), []
    for depth in running:
        if depth not in wanted and sum(map(size, left)) > room:
            left.remove(depth)
            going.append(depth)
    return going
