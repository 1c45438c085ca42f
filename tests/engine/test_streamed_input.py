"""An input that comes in chunks is run at one depth, whatever its later chunks ask for."""

import random

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from raee_serve.engine.settings import engine_options, exit_args
from tests.engine.engines import tiny_engine
from tests.engine.reference import greedy_mismatches
from tests.tiny import ENGINE_SIZES, saved, tiny_llama

pytestmark = pytest.mark.engine

NUM_LAYERS, DEPTH, NUM_TOKENS = 6, 2, 8
ASKED = [exit_args(DEPTH), exit_args(NUM_LAYERS), None]
"""By the three chunks, each longer than a KV block."""
SESSION = "session"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny_llama(NUM_LAYERS, **ENGINE_SIZES)
    return saved(model, tmp_path_factory.mktemp("tiny") / "llama")


@pytest.mark.parametrize("kv_segments", [1, 3])
def test_all_chunks_run_at_the_depth_of_the_first(checkpoint, kv_segments):
    rng = random.Random(5)
    chunks = [[rng.randrange(5, ENGINE_SIZES["vocab_size"]) for _ in range(150)] for _ in ASKED]

    with tiny_engine(checkpoint, **engine_options(kv_segments=kv_segments)) as llm:
        answers = streamed(llm.llm_engine, chunks)
        assert llm.reset_prefix_cache(), "vLLM frees the cache only when no block is held"

    # vLLM goes on without the last token of an answer, which no layer has seen.
    prompts, before = [], []
    for chunk, answer in zip(chunks, answers, strict=True):
        prompts.append([*before, *chunk])
        before = [*prompts[-1], *answer[:-1]]
    assert greedy_mismatches(checkpoint, DEPTH, prompts, answers) == []


def streamed(engine, chunks):
    """The answer to each chunk of one session, of an engine in this process."""
    core = engine.engine_core
    answers = []
    for chunk, extra_args in zip(chunks, ASKED, strict=True):
        core.add_request(as_chunk(engine, chunk, extra_args))
        tokens = []
        while len(tokens) < NUM_TOKENS:
            tokens += [t for o in core.get_output().outputs for t in o.new_token_ids]
        answers.append(tokens)
    core.abort_requests([SESSION])
    return answers


def as_chunk(engine, tokens, extra_args, max_tokens=NUM_TOKENS):
    """As `AsyncLLM` makes it of a `StreamingInput`."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra_args,
    )
    return engine.input_processor.process_inputs(
        SESSION,
        {"prompt_token_ids": list(tokens)},  # which a session goes on to extend
        params,
        supported_tasks=engine.get_supported_tasks(),
        resumable=True,
    )
