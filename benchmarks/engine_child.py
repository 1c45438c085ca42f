"""One engine in a process of its own: reads jobs as JSON lines, answers when they are done."""

import json
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams

from raee_serve.engine.settings import exit_args


def main() -> None:
    """First line in: engine arguments. Then a job a line; each answer is one JSON line."""
    jobs = iter(sys.stdin.readline, "")
    start = time.perf_counter()
    llm = LLM(**json.loads(next(jobs)))
    config = llm.llm_engine.model_config
    answer(startup_s=time.perf_counter() - start, vocab_size=config.get_vocab_size())
    for line in jobs:
        answer(**run(llm, json.loads(line)))


def run(llm: LLM, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job: the seconds it took and, where it asks for `logprobs`, all that was said.

    That is each request's `tokens`, and for each of them so many of the `logprobs` by token id.
    Raises `RuntimeError` if a request gave another number of tokens.
    """
    exits = job["exit_layers"] or [None] * len(job["prompts"])
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=job["output_len"],
            ignore_eos=True,
            detokenize=False,
            logprobs=job.get("logprobs"),
            extra_args=None if d is None else exit_args(d),
        )
        for d in exits
    ]
    prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    said = [output.outputs[0] for output in outputs]
    lengths = {len(completion.token_ids) for completion in said}
    if lengths != {job["output_len"]}:
        raise RuntimeError(f"output lengths {lengths}; asked for {job['output_len']}")
    if "logprobs" not in job:
        return {"seconds": seconds}
    return {
        "seconds": seconds,
        "tokens": [list(completion.token_ids) for completion in said],
        "logprobs": [
            [{token: told.logprob for token, told in at.items()} for at in completion.logprobs]
            for completion in said
        ],
    }


def answer(**fields: Any) -> None:
    print("ANSWER" + json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
