"""Requests of every length and depth that come, go and are aborted at random."""

from dataclasses import dataclass, field

from vllm import SamplingParams

from raee_serve.engine.settings import exit_args
from tests.engine.reference import mixed_mismatches


@dataclass
class Request:
    prompt: list[int]
    exit_layer: int
    max_tokens: int
    abort_after: int | None
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


def random_requests(rng, num_requests, num_layers, output_lens=(1, 2, 8, 24)):
    """Prompts of 1 to 600 tokens, many with a common beginning; one in five to be aborted."""
    stems = [[rng.randrange(5, 512) for _ in range(256)] for _ in range(4)]
    requests = []
    for _ in range(num_requests):
        length = rng.choice([1, 3, 17, 40, 130, 300, 600])
        stem = rng.choice(stems) if rng.random() < 0.5 else []
        body = [rng.randrange(5, 512) for _ in range(length)]
        abort_after = rng.choice([0, 0, 1, 4]) if rng.random() < 0.2 else None
        requests.append(
            Request(
                prompt=(stem + body)[:600],
                exit_layer=rng.randint(1, num_layers),
                max_tokens=rng.choice(output_lens),
                abort_after=abort_after,
            )
        )
    return requests


def serve(engine, requests, rng):
    """Add requests in bursts while others run; abort some as they prefill, some as they decode."""
    waiting = {str(i): request for i, request in enumerate(requests)}
    running = {}
    while waiting or engine.has_unfinished_requests():
        for request_id in list(waiting)[: rng.choice([0, 0, 1, 3, 12])]:
            request = running[request_id] = waiting.pop(request_id)
            params = SamplingParams(
                temperature=0.0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=exit_args(request.exit_layer),
            )
            engine.add_request(request_id, {"prompt_token_ids": request.prompt}, params)
        for output in engine.step():
            request = running[output.request_id]
            request.tokens = list(output.outputs[0].token_ids)
            request.finished = output.finished
        unwanted = [
            request_id
            for request_id, r in running.items()
            if not r.finished and r.abort_after is not None and len(r.tokens) >= r.abort_after
        ]
        engine.abort_request(unwanted)
        for request_id in unwanted:
            del running[request_id]


def wrong_tokens(checkpoint, requests):
    """What cut checkpoints would not have said; an aborted request's tokens are checked, too."""
    partial = [r for r in requests if r.tokens]
    return mixed_mismatches(
        checkpoint,
        [r.exit_layer for r in partial],
        [r.prompt for r in partial],
        [r.tokens for r in partial],
    )
