"""Answers that are labels: what is asked of the engine for one, and what clients get to see.

A request that leaves by probe generates one token, which says the place of a label and is no token
of the vocabulary. Its outputs are rewritten here: the label's text, its real tokens, and the
labels' probabilities where somebody asked for some.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.exceptions import GenerationError
from vllm.logprobs import Logprob
from vllm.sampling_params import SamplingParams

from raee_serve.engine.settings import label_of, probe_args, with_own_args
from raee_serve.server.limits import AllowedLabels, Written

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput

logger = logging.getLogger(__name__)

EXCLUDED = -1e9
"""Bias of a label that the request does not allow."""

Probabilities = Mapping[str, float]
"""By label, most probable first."""


@dataclass(frozen=True, slots=True)
class LabelAnswer:
    """How one prompt is answered with a label.

    set_id, probe: the probe set and the name of the probe in it.
    scores: what is added to each label's score; empty for nothing.
    is_greedy: the request states no temperature, so that its answer is the most probable label.
    wants_all: somebody reads the probabilities of all labels.
    """

    labels: AllowedLabels
    set_id: str
    probe: str
    scores: tuple[float, ...] = ()
    is_greedy: bool = False
    wants_all: bool = False

    def params(self, given: SamplingParams, exit_layer: int, max_logprobs: int) -> SamplingParams:
        """What to ask of the engine, by the parameters that vLLM made of the client's body.

        Only how to draw is taken over from them. max_logprobs: most that vLLM gives; -1 for any.
        """
        is_greedy = self.is_greedy and given.n == 1
        own = SamplingParams(
            n=given.n,
            seed=given.seed,
            temperature=0.0 if is_greedy else given.temperature,
            top_p=given.top_p,
            # With one that drops no label the engine would fill in the whole vocabulary.
            top_k=0 if given.top_k >= len(self.labels.names) else given.top_k,
            min_p=given.min_p,
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            logprobs=self._num_logprobs(given.num_logprobs, max_logprobs),
            output_kind=given.output_kind,
            extra_args=given.extra_args,
            watermarking=False,
            skip_clone=True,
        )
        return with_own_args(own, probe_args(exit_layer, self.set_id, self.probe, self._bias()))

    def _num_logprobs(self, asked: int | None, most: int) -> int | None:
        num_labels = len(self.labels.names)
        if self.wants_all or asked == -1:
            asked = num_labels
        if asked is None:
            return None
        return min(asked, num_labels, num_labels if most == -1 else most)

    def _bias(self) -> list[float]:
        scores = self.scores or (0.0,) * len(self.labels.names)
        pairs = zip(scores, self.labels.written, strict=True)
        return [EXCLUDED if label is None else score for score, label in pairs]

    def written(self, token_id: int) -> Written:
        """The label that a sampled token stands for. Raises GenerationError if there is none."""
        place = label_of(token_id)
        label = None if place is None else self.labels.written[place]
        if label is None:
            logger.error("The workers have no answer by probe %s of %s.", self.probe, self.set_id)
            raise GenerationError("the workers have no label for this prompt; their log says why")
        return label

    def probabilities(self, logprobs: Mapping[int, Logprob]) -> Probabilities:
        """By name of the label, of those that the engine told. logprobs: by sampled token id."""
        told = {label_of(token): math.exp(entry.logprob) for token, entry in logprobs.items()}
        places = sorted((p for p in told if p is not None), key=lambda place: -told[place])
        return {self.labels.names[place]: told[place] for place in places}


async def as_labels(
    outputs: AsyncGenerator[RequestOutput, None],
    answer: LabelAnswer,
    num_logprobs: int | None,
    note: Callable[[Probabilities], None],
) -> AsyncGenerator[RequestOutput, None]:
    """The engine's outputs as clients are to see them.

    num_logprobs: as the client asked. note: told the probabilities where the engine gives them.
    Raises GenerationError where the workers have no answer.
    """
    async with aclosing(outputs):
        async for output in outputs:
            for completion in output.outputs:
                if not completion.token_ids:  # of an aborted request, for one
                    continue
                told = completion.logprobs[0] if completion.logprobs else {}
                _relabel(completion, told, answer, num_logprobs)
                if told:
                    note(answer.probabilities(told))
            yield output


def _relabel(
    completion: CompletionOutput,
    entries: Mapping[int, Logprob],
    answer: LabelAnswer,
    num_logprobs: int | None,
) -> None:
    """Put the label in the place of the token that stands for it."""
    token = completion.token_ids[0]
    label = answer.written(token)
    completion.text, completion.token_ids = label.text, list(label.token_ids)
    completion.finish_reason, completion.stop_reason = "stop", None
    completion.cumulative_logprob, completion.logprobs = None, None
    if num_logprobs is not None:
        completion.cumulative_logprob = entries[token].logprob
        completion.logprobs = _logprobs(entries, token, answer, num_logprobs)


def _logprobs(
    entries: Mapping[int, Logprob], sampled: int, answer: LabelAnswer, most: int
) -> list[dict[int, Logprob]]:
    """One entry for each token of the label. The first has the label's whole text and, beside it,
    the other labels' as far as the client asked for some; the texts of all of them make the label.
    """
    label = answer.written(sampled)
    first = {label.token_ids[0]: _entry(entries[sampled], label)}
    for token, entry in entries.items():
        place = label_of(token)
        other = None if place is None else answer.labels.written[place]
        if token == sampled or other is None or (entry.rank or 0) > most >= 0:
            continue
        key = other.token_ids[0]
        first[-token if key in first else key] = _entry(entry, other)
    rest = [{token: Logprob(0.0, 1, "")} for token in label.token_ids[1:]]
    return [first, *rest]


def _entry(entry: Logprob, label: Written) -> Logprob:
    return Logprob(entry.logprob, entry.rank, label.text)
