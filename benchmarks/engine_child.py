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
        run(llm, json.loads(line))
        answer()


def run(llm: LLM, job: dict[str, Any]) -> None:
    """Run one job; raises if a request gave another number of tokens."""
    exits = job["exit_layers"] or [None] * len(job["prompts"])
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=job["output_len"],
            ignore_eos=True,
            detokenize=False,
            extra_args=None if d is None else exit_args(d),
        )
        for d in exits
    ]
    prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    lengths = {len(o.outputs[0].token_ids) for o in outputs}
    if lengths != {job["output_len"]}:
        raise RuntimeError(f"output lengths {lengths}; asked for {job['output_len']}")


def answer(**fields: Any) -> None:
    print("ANSWER" + json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
