"""What the systems are given to do."""

import random
from argparse import ArgumentTypeError
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Workload:
    """Requests of one shape: `prompt_len` random tokens in, exactly `output_len` tokens out."""

    name: str
    num_requests: int
    prompt_len: int
    output_len: int

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens of one run."""
        return self.num_requests * (self.prompt_len + self.output_len)

    def at_most(self, num_requests: int) -> "Workload":
        """The same with no more than that many requests."""
        return replace(self, num_requests=min(self.num_requests, num_requests))

    def job(
        self, seed: int, vocab_size: int, exit_layers: list[int] | None = None
    ) -> dict[str, Any]:
        """One run's prompts; a new seed gives new prompts, so no run meets a cached prefix.

        exit_layers: [num_requests], or `None` for systems that know no exits.
        """
        rng = random.Random(f"{self.name}-{self.num_requests}-{seed}")
        prompts = [
            [rng.randrange(10, vocab_size) for _ in range(self.prompt_len)]
            for _ in range(self.num_requests)
        ]
        return {"prompts": prompts, "output_len": self.output_len, "exit_layers": exit_layers}


WORKLOADS = {
    w.name: w
    for w in (
        Workload("decode-heavy", 64, 32, 64),
        Workload("prefill-heavy", 64, 512, 1),
        Workload("single", 1, 32, 64),
    )
}


def workload_named(text: str) -> Workload:
    """An argument that names one of WORKLOADS, or NAME:N with N of its requests at most.

    Raises `ArgumentTypeError` for any other.
    """
    name, colon, number = text.partition(":")
    if name not in WORKLOADS or (colon and not (number.isdecimal() and int(number) > 0)):
        raise ArgumentTypeError(
            f"workload {text!r}; allowed: {', '.join(WORKLOADS)}, or one with :N, N from 1"
        )
    return WORKLOADS[name].at_most(int(number)) if colon else WORKLOADS[name]
