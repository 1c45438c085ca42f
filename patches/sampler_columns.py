"""Seam: hand vLLM's sampler logits with fewer columns than the vocabulary has tokens.

Upstream: the samplers of both model runners take the number of columns from the logits, save where
a request's sampling parameters are kept by token id or as the size of the vocabulary.
Checked on: vLLM 0.32.0.
Why no extension point serves: how wide logits are is nobody's to choose.
Retired by: exit heads that bring their own sampler.
"""

from importlib.metadata import entry_points
from typing import Any

from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

from raee_serve_patches.seam import Seam

_V1 = "vllm.v1.sample"
_V2 = "vllm.v1.worker.gpu.sample"

SEAM = Seam(
    "sampler_columns",
    {
        f"{_V1}.sampler:Sampler": "450c135c34a7",
        f"{_V1}.ops.topk_topp_sampler:apply_top_k_top_p_pytorch": "d6bcc4924866",
        f"{_V1}.ops.topk_topp_sampler:TopKTopPSampler.forward_cpu": "6d05adf47d12",
        f"{_V1}.logits_processor.builtin:MinPLogitsProcessor": "b4f4182c5104",
    },
)
V2_SEAM = Seam(
    "sampler_columns",
    {
        f"{_V2}.sampler:Sampler": "aec2c8c226b5",
        f"{_V2}.states:SamplingStates": "51494abca472",
        f"{_V2}.gumbel:gumbel_sample": "fdbaf7f6b7c1",
        f"{_V2}.logprob:compute_topk_scores": "16a0e64b66a7",
    },
)


class SamplerColumns:
    """How many columns the sampler of an engine needs."""

    def __init__(self, vllm_config: Any) -> None:
        model_config = vllm_config.model_config
        self._vocab_size = model_config.get_vocab_size()
        # Processors that are not vLLM's may write to the column of any token, in all rows.
        processors = model_config.logits_processors or entry_points(group=LOGITSPROCS_GROUP)
        self._always_all = bool(processors)

    def needed(self, params: Any) -> int:
        """The least columns for a request with these `SamplingParams`; the vocabulary at most.

        One column for each log-probability that it wants. All columns where it has something that
        vLLM looks up by token id. All too for `top_k`: rows without it have the vocabulary's size
        as theirs, and the sampler takes the best `top_k` columns of every row.
        """
        by_token = (
            params.allowed_token_ids
            or params.bad_words
            or params.logit_bias
            or params.logprob_token_ids
            or params.min_tokens
            or params.structured_outputs is not None
            or params.thinking_token_budget is not None
            or params.presence_penalty
            or params.frequency_penalty
            or params.repetition_penalty != 1
        )
        top_k = 0 < params.top_k < self._vocab_size
        if self._always_all or by_token or top_k or params.logprobs == -1:
            return self._vocab_size
        return min(params.logprobs or 0, self._vocab_size)
