"""LoRA adapters, which the backbone's exit table knows nothing of."""

import pytest
from openai import OpenAI

from raee_serve.cli import main
from raee_serve.evaluation.run import PATIENT_TIMEOUT_MS
from raee_serve.evaluation.server_process import running_server
from tests.tiny import (
    ADAPTER_RANK,
    ENGINE_SIZES,
    WITH_TOKENIZER,
    tiny_llama,
    tokenized,
    write_adapter,
)

pytestmark = pytest.mark.server

NUM_LAYERS = 6


@pytest.fixture(scope="module")
def client(tmp_path_factory, smollm2):
    """A server of `backbone` and `adapter`, with a table of the backbone's exits."""
    directory = tmp_path_factory.mktemp("adapters")
    sizes = {**ENGINE_SIZES, **WITH_TOKENIZER}
    checkpoint = tokenized(tiny_llama(NUM_LAYERS, **sizes), directory / "model", smollm2)
    write_adapter(tiny_llama(NUM_LAYERS, **sizes), directory / "adapter", seed=1)
    table = ["--table", str(directory / "table")]
    build = ["build", "--model", str(checkpoint), "--task", "demo_sentiment", "--limit", "24"]
    assert main([*build, *table]) == 0
    flags = [*table, "--served-model-name", "backbone", "--enable-lora"]
    flags += ["--lora-modules", f"adapter={directory / 'adapter'}"]
    flags += ["--max-lora-rank", str(ADAPTER_RANK)]
    flags += ["--lookup-timeout-ms", str(PATIENT_TIMEOUT_MS)]
    with running_server(str(checkpoint), flags) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client, model, **raee):
    """(exit layer, reason) of a request that names a task of the table."""
    answer = client.completions.with_raw_response.create(
        model=model,
        prompt="A warm and funny film. It was",
        extra_body={"raee": {"task": "demo_sentiment", **raee}},
    )
    assert answer.parse().choices[0].text.strip()
    return int(answer.headers["x-raee-exit-layer"]), answer.headers["x-raee-reason"]


def test_an_adapter_without_a_table_runs_at_full_depth(client):
    assert ask(client, "adapter") == (NUM_LAYERS, "adapter")


def test_the_backbone_beside_it_still_looks_up(client):
    assert ask(client, "backbone")[1] in ("retrieved", "no-evidence", "far")


def test_an_adapter_may_be_asked_for_at_a_depth(client):
    assert ask(client, "adapter", exit_layer=2) == (2, "override")
