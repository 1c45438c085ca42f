"""One server for all tests of this group: SmolLM2 with a small table of the shipped demo tasks."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from raee_serve.cli import main
from raee_serve.evaluation.run import PATIENT_TIMEOUT_MS
from raee_serve.evaluation.server_process import running_server
from raee_serve.tasks.datasets import load_examples
from raee_serve.tasks.registry import get_task

MODEL = "smollm2-135m"
NUM_LAYERS = 30
ROWS = 64
"""Table rows a task: the first of a shuffle of the demo set, enough for probes."""
VLLM_FLAGS = [
    "--max-model-len",
    "8192",
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "hermes",
]
"""Vanilla vLLM has the same where it is compared with this server."""


@dataclass(frozen=True)
class Served:
    """url: without /v1. table: the directory the server was started with."""

    url: str
    client: OpenAI
    table: Path


@pytest.fixture(scope="session")
def built_table(tmp_path_factory, smollm2, minilm) -> Path:
    """A table of SmolLM2 over the demo tasks, made by the command a user would type."""
    table = tmp_path_factory.mktemp("tables") / "demo"
    command = ["build", "--model", MODEL, "--table", str(table), "--limit", str(ROWS)]
    command += ["--task", "demo_sentiment", "--task", "demo_chat_sentiment"]
    assert main(command) == 0
    return table


@pytest.fixture(scope="session")
def served(built_table, tmp_path_factory):
    """A running server; its table is a copy, so that a test may delete it."""
    table = tmp_path_factory.mktemp("served") / "demo"
    shutil.copytree(built_table, table)
    flags = ["--table", str(table), *VLLM_FLAGS]
    flags += ["--lookup-timeout-ms", str(PATIENT_TIMEOUT_MS)]
    with running_server(MODEL, flags) as url:
        yield Served(url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), table)


@pytest.fixture(scope="session")
def reviews() -> list[str]:
    """Texts of the demo set, of which some are rows of the table."""
    return [example.text for example in load_examples(get_task("demo_sentiment"), "train")]
