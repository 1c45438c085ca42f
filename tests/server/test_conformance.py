"""The official SDKs, for Python and for Node, get from this server what they get from vanilla vLLM.

The cases are in `conformance/cases.py`. Vanilla answers first; then every answer of this server is
held against it: at full depth they are equal, at a lesser depth they have one shape.
"""

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from raee_serve.evaluation.server_process import (
    VANILLA_ENVIRONMENT,
    running_process,
    vanilla_command,
)
from raee_serve.table.probe import default_dtype
from tests.server.asking import decisions
from tests.server.conformance import client
from tests.server.conformance.cases import cases
from tests.server.conformance.compare import differences, normal, shape
from tests.server.conftest import MODEL, NUM_LAYERS, VLLM_FLAGS

pytestmark = pytest.mark.server

FOLDER = Path(__file__).parent / "conformance"
CASES = cases()
GOOD = [case for case in CASES if not case.is_error]
OF_CLIENT = {"python": CASES, "node": CASES[::3]}
"""Every third for Node: what a server answers does not depend on who asks."""
SOME = [case for number, case in enumerate(GOOD) if case.task or number % 3 == 0]
"""What `off` is asked for: all that would exit early, and a third of the rest, which would not."""
LESS = {"exit_layer": 12}


def node(plan):
    """`client.run` by the SDK for Node."""
    done = subprocess.run(
        ["node", "run.mjs"], cwd=FOLDER, input=json.dumps(plan), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NO_NODE = "Node or its openai package is missing (make test installs the package where Node is)"
HAS_NODE = shutil.which("node") and (FOLDER / "node_modules" / "openai").is_dir()
CLIENTS = {"python": client.run} | ({"node": node} if HAS_NODE else {})
EVERY_CLIENT = [
    "python",
    pytest.param("node", marks=pytest.mark.skipif(not HAS_NODE, reason=NO_NODE)),
]


def ask(name, url, raee=None, selected=CASES):
    """By case what a client gets at `url`, with this `raee` object where admission reads bodies."""
    asked = []
    for case in selected:
        one = asdict(case)
        if case.takes_raee:
            one["body"] = {"model": MODEL, **case.body}
            one["extra"] = case.extra | ({"raee": raee} if raee else {})
        asked.append(one)
    answers = CLIENTS[name]({"base_url": f"{url}/v1", "cases": asked})
    return {case.name: answer for case, answer in zip(selected, answers, strict=True)}


def compared(expected, answers, selected=CASES, form=lambda answer: answer):
    """Every difference in the selected cases, as `case.path: vanilla | this server`."""
    return [
        difference
        for name in (case.name for case in selected)
        for difference in differences(
            form(normal(expected[name])), form(normal(answers[name])), name
        )
    ]


@pytest.fixture(scope="module")
def vanilla(smollm2):
    """By client what vanilla vLLM answers, with the flags of the server it is compared with."""
    command = vanilla_command(smollm2, MODEL, ["--enforce-eager", *VLLM_FLAGS])
    if default_dtype(torch.device("cpu")) is torch.float32:
        command += ["--dtype", "float32"]  # as raee-serve chooses by itself
    with running_process(command, VANILLA_ENVIRONMENT) as (url, _):
        return {name: ask(name, url, selected=OF_CLIENT[name]) for name in CLIENTS}


def test_errors_are_errors_and_nothing_else_is(vanilla):
    """Else two servers might agree on nothing."""
    for case in CASES:
        answer = vanilla["python"][case.name]
        assert ("error" in answer) == case.is_error, (case.name, answer)
        assert 200 <= answer["status"] < 500, (case.name, answer)


def test_a_request_that_is_off_gets_vanillas_answer(vanilla, served):
    answers = ask("python", served.url, {"off": True}, SOME)
    assert compared(vanilla["python"], answers, SOME) == []
    for case in SOME:
        headers = answers[case.name]["headers"]
        if case.is_admitted:
            assert set(decisions(headers)["reasons"]) == {"off"}
        else:
            assert headers == {}


@pytest.mark.parametrize("name", EVERY_CLIENT)
def test_a_client_that_knows_nothing_of_this_gets_vanillas_answers(vanilla, served, name):
    """Prompts of no task run at full depth, those of the table's tasks at the retrieved one."""
    asked = OF_CLIENT[name]
    answers = ask(name, served.url, selected=asked)
    decided = [case for case in asked if case.task]
    others = [case for case in asked if not case.task]
    assert compared(vanilla[name], answers, others) == []
    assert compared(vanilla[name], answers, decided, shape) == []
    layers = []
    for case in decided:
        found = decisions(answers[case.name]["headers"])
        assert set(found["reasons"]) == {"retrieved"} and set(found["tasks"]) == {case.task}
        layers += found["layers"]
    assert min(layers) < NUM_LAYERS


def test_answers_from_a_lesser_depth_have_the_same_shape(vanilla, served):
    """All but calls of tools: whether a text is one is a matter of its content."""
    without_tools = [case for case in GOOD if "tools" not in case.body]
    answers = ask("python", served.url, LESS, without_tools)
    assert compared(vanilla["python"], answers, without_tools, shape) == []
    assert len(compared(vanilla["python"], answers, without_tools)) > 10  # and another content
