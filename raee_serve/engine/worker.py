"""CPU worker that hands each step's exit layers to the model."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from raee_serve.engine.kv_cache import is_split
from raee_serve.engine.truncating_worker import TruncatingWorker
from raee_serve_patches.seeded_chunks import undrawn_while_incomplete
from raee_serve_patches.segment_groups import share_between_segments
from raee_serve_patches.slot_mapping import compute_slots_on_host


class TruncatingCPUWorker(TruncatingWorker, CPUWorker):
    """vLLM's CPU worker; the step it runs is open to the model while it runs."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        if self.use_v2_model_runner:
            return
        if is_split(kv_cache_config):
            share_between_segments(self.model_runner, self.step)
        else:
            compute_slots_on_host(self.model_runner)

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.use_v2_model_runner:
            return super().sample_tokens(grammar_output)
        with undrawn_while_incomplete(self.model_runner):
            return super().sample_tokens(grammar_output)
