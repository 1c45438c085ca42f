"""Seam: let a seeded request's prompt be cut by a step's token budget on CPU.

Upstream: `GPUModelRunner.input_batch.generators` (row to generator; the sampler's metadata hold
the same dict) and `discard_request_mask` (rows whose sampled token is thrown away).
Checked on: vLLM 0.32.0, CPU.
Why no extension point serves: the runner samples a token for such a row too, and then takes its
generator back by setting its offset, which CPU generators do not have: the engine stops.
Retired by: a runner that draws nothing for rows it discards, or puts the generator's state back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raee_serve_patches.seam import Seam

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

SEAM = Seam(
    "seeded_chunks",
    {
        f"{_RUNNER}._bookkeeping_sync": "13c3e81003a7",
        f"{_RUNNER}._prepare_inputs": "c31a77c123a0",
        "vllm.v1.worker.gpu_input_batch:InputBatch._make_sampling_metadata": "4d1929cc9621",
    },
)


@contextmanager
def undrawn_while_incomplete(runner: Any) -> Iterator[None]:
    """Around sampling: rows whose token is discarded leave their generators as they are.

    So a seeded request draws the same numbers however its prompt is cut.
    """
    generators = runner.input_batch.generators
    discarded = runner.discard_request_mask.np
    held = {row: generators.pop(row) for row in list(generators) if discarded[row]}
    try:
        yield
    finally:
        generators.update(held)
