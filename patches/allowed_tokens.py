"""Seam: know the tokens that requests of a V1 step are limited to.

Upstream: `GPUModelRunner.input_batch` (`has_allowed_token_ids`, `num_logprobs`,
`logprob_token_ids`), `num_prompt_logprobs`, and of `requests` their `sampling_params`. That the
sampler puts every token that is not allowed at minus infinity before it reads any logit, unless
log-probabilities are asked for, is what makes their logits needless.
Checked on: vLLM 0.32.0, CPU.
Why no extension point serves: `compute_logits` is given hidden states and not whose they are.
Retired by: sampling metadata within reach of `compute_logits`.
"""

from collections.abc import Sequence
from typing import Any

from raee_serve_patches.seam import Seam

_BATCH = "vllm.v1.worker.gpu_input_batch:InputBatch"
_SAMPLER = "vllm.v1.sample.sampler:Sampler"

SEAM = Seam(
    "allowed_tokens",
    {
        f"{_BATCH}.add_request": "33b3f53b9b19",
        f"{_BATCH}.remove_request": "74776981e14d",
        f"{_SAMPLER}.forward": "586fe802add4",
        f"{_SAMPLER}.apply_logits_processors": "4b31813d0881",
        "vllm.model_executor.layers.logits_processor:LogitsProcessor": "b3c17f33ff23",
    },
)


def allowed_tokens(runner: Any, request_ids: Sequence[str], most: int) -> tuple[int, ...] | None:
    """All that any of these requests of the step in flight may answer with, in rising order.

    `None` where these are more than `most`, or one wants to know the probabilities of others.
    Asked in every step: a request that may answer with too many ends the search.
    """
    batch = runner.input_batch
    if not all(request_id in batch.has_allowed_token_ids for request_id in request_ids):
        return None
    wants_others = batch.num_logprobs.keys() | batch.logprob_token_ids.keys()
    if not wants_others.isdisjoint(request_ids) or runner.num_prompt_logprobs:
        return None
    tokens: set[int] = set()
    for request_id in request_ids:
        allowed = runner.requests[request_id].sampling_params.allowed_token_ids
        if len(allowed) > most:
            return None
        tokens.update(allowed)
    return tuple(sorted(tokens)) if len(tokens) <= most else None
