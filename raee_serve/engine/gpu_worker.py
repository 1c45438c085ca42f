"""CUDA worker that hands each step's exit layers to the model."""

from vllm.v1.worker.gpu_worker import Worker

from raee_serve.engine.truncating_worker import TruncatingWorker


class TruncatingGPUWorker(TruncatingWorker, Worker):
    """vLLM's GPU worker; the step it runs is open to the model while it runs."""
