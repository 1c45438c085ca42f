"""The mixed-depth batch of the parity tests, made from a seed alone."""

import random
from dataclasses import dataclass

NUM_REQUESTS = 64
MAX_TOKENS = 32
CHUNK = 256
"""Token budget of a step (`max_num_batched_tokens`): longer prompts take several chunks."""


@dataclass(frozen=True)
class MixedRequest:
    """A prompt of token ids and the exit layer it is to run at."""

    prompt: list[int]
    exit_layer: int


def mixed_requests(num_layers: int, vocab_size: int, first_token: int) -> list[MixedRequest]:
    """64 requests over nine depths, shallow and deep alternating, some of several chunks.

    Depths go round shallow first, so in every batch deep requests stand behind shallow ones:
    the place where a row-indexed tensor that was left whole goes wrong.
    """
    rng = random.Random(7)
    depths = sorted({1, 2, *(round(num_layers * i / 7) for i in range(1, 8))})
    lengths = [2 * CHUNK + 100, 90, 20, 5, CHUNK + 44, 33, 12, 60]
    return [
        MixedRequest(
            [first_token, *(rng.randrange(10, vocab_size) for _ in range(lengths[i % 8] - 1))]
            if i % 8 != 0 or i < 24
            else [first_token, *(rng.randrange(10, vocab_size) for _ in range(17))],
            depths[i % len(depths)],
        )
        for i in range(NUM_REQUESTS)
    ]
