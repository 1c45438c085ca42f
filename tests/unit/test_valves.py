"""Safety valves: least depths, shadow, and what runs at both depths."""

from argparse import ArgumentParser
from dataclasses import replace

import pytest

from raee_serve.engine.settings import PROBE_KEY, exit_args, probe_args
from raee_serve.errors import RaeeError
from raee_serve.records import ExitDecision, Reason
from raee_serve.server import access, valves
from raee_serve.server.admission import Admission
from raee_serve.server.engine_client import DepthClient
from raee_serve.server.sampling import MAX_RUNNING, agreement
from tests.unit.serving import ALLOWED, LABELS, LOOP, NUM_LAYERS, PROBES, TASK, Server

pytestmark = pytest.mark.unit


def parsed(*flags):
    parser = ArgumentParser()
    valves.add_arguments(parser)
    access.add_arguments(parser)
    return parser.parse_args(flags)


def test_flags_make_valves():
    made = valves.Valves.of(parsed("--min-exit-layer", "6", "--min-exit-layer", "sst2=9"))
    assert made == valves.Valves(6, {"sst2": 9})
    assert made.least_layer([]) == made.least_layer(["trec"]) == 6
    assert made.least_layer(["trec", "sst2"]) == 9
    assert str(made) == "least exit layer 6, sst2 9"
    assert str(valves.Valves.of(parsed())) == "none"


@pytest.mark.parametrize(
    "flags",
    [
        ("--min-exit-layer", "half"),
        ("--min-exit-layer", "-1"),
        ("--min-exit-layer", "sst2="),
        ("--min-exit-layer", "=3"),
        ("--sample-full", "1.5"),
        ("--sample-full", "-0.1"),
        ("--sample-full", "nan"),
    ],
)
def test_bad_valves_are_named(flags):
    with pytest.raises(RaeeError, match=flags[0]):
        valves.Valves.of(parsed(*flags))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (valves.Valves(0), r"0; allowed: 1\.\.30"),
        (valves.Valves(31), r"31; allowed: 1\.\.30"),
        (valves.Valves(1, {"sst2": 40}), r"40; allowed: 1\.\.30"),
        (valves.Valves(1, {"sst3": 4}), r"'sst3'; the table's: sst2"),
    ],
)
def test_valves_that_do_not_fit_the_table_are_named(made, message):
    with pytest.raises(RaeeError, match=message):
        made.check(NUM_LAYERS, ["sst2"])


def test_flags_make_access():
    made = access.Access.of(parsed("--disable-explain", "--max-prompts", "5"))
    assert not made.allows("explain") and made.allows("preview") and made.max_prompts == 5
    for flag in ("--max-prompts", "--max-body-bytes"):
        with pytest.raises(RaeeError, match=f"{flag} is 0; allowed: at least 1"):
            access.Access.of(parsed(flag, "0"))


def test_a_look_up_is_told_the_least_layer():
    admission = Admission(
        NUM_LAYERS, {"sst2": TASK}, {"sst2": LABELS}, valves=valves.Valves(4, {"sst2": 12})
    )
    body = {"prompt": "film", "raee": {"task": "sst2"}}
    (lookup,) = admission.plan("completions", body, admission.options(body), ["film"]).entries
    assert lookup.min_layer == 12


@pytest.mark.parametrize(("raee", "least"), [({}, 6), ({"task": "sst2"}, 9)])
def test_a_request_cannot_ask_for_less(raee, least):
    server = Server(min_layer=6, min_layers={"sst2": 9})
    answer = server.post(prompt="a", raee={"exit_layer": least - 1, **raee})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "raee.exit_layer"
    assert f"{least}..30" in answer.json()["error"]["message"]
    assert server.post(prompt="a", raee={"exit_layer": least, **raee}).status_code == 200


def test_off_is_vanilla_whatever_else_is_asked():
    server = Server(fixed_layer=None)
    answer = server.post(prompt="a It was", raee={"off": True, "task": "sst2", "exit_layer": 3})
    assert answer.headers["x-raee-reason"] == "off"
    assert answer.headers["x-raee-exit-layer"] == str(NUM_LAYERS)
    assert server.exit_layers() == [NUM_LAYERS] and not server.looked_up
    assert server.bodies == [b'{"prompt": "a It was"}']
    fixed = Server(fixed_layer=3)
    fixed.post(prompt="a", raee={"off": True})
    assert fixed.exit_layers() == [NUM_LAYERS]


def test_the_kill_switch_accepts_every_request_and_changes_none():
    server = Server()
    gate = replace(server.gate, admission=Admission(NUM_LAYERS, off=True))
    server.app.state.engine_client = DepthClient(server.engine, gate, LOOP)
    answer = server.post(prompt=["a It was", "b"], raee={"task": "gone", "exit_layer": 3, "x": 1})
    assert answer.headers["x-raee-reason"] == "off, off"
    assert server.exit_layers() == [NUM_LAYERS] * 2 and not server.looked_up
    assert server.bodies == [b'{"prompt": ["a It was", "b"]}']


def test_in_shadow_nothing_is_truncated_and_everything_recorded():
    server = Server(shadow=True)
    answer = server.post(prompt=["a It was", "b"], **ALLOWED)
    headers = answer.headers
    assert headers["x-raee-exit-layer"] == "30, 30"
    assert headers["x-raee-reason"] == "shadow, unmatched"
    assert headers["x-raee-decided-layer"] == "5, -"
    assert server.exit_layers() == [NUM_LAYERS] * 2
    assert [p.extra_args for p in server.engine.params] == [exit_args(NUM_LAYERS)] * 2
    named = server.post(prompt="film", raee={"task": "sst2"})
    assert named.headers["x-raee-reason"] == "shadow"
    assert named.headers["x-raee-exit-head"] == "probe"
    assert named.json()["choices"] == [[" great"]]
    alone = probe_args(NUM_LAYERS, PROBES.id, "sst2/alone", (0.0, 0.0))
    assert server.engine.params[-1].extra_args == alone
    assert server.value("raee_shadow_exit_layer_sum", task="sst2") == 10
    assert server.value("raee_layers_saved_total", task="sst2") == 0
    override = server.post(prompt="a", raee={"exit_layer": 7})
    assert override.headers["x-raee-reason"] == "shadow"
    assert override.headers["x-raee-decided-layer"] == "7"
    full = server.post(prompt="a", raee={"exit_layer": "full"})
    assert full.headers["x-raee-reason"] == "override"
    assert "x-raee-decided-layer" not in full.headers


def test_nor_on_routes_that_admission_does_not_read():
    server = Server(fixed_layer=7, shadow=True)
    server.post("/v1/responses", prompt="a")
    server.post(prompt="a")
    assert server.exit_layers() == [NUM_LAYERS] * 2


def test_shadow_leaves_only_the_probe_that_is_full_depths_own():
    decided = ExitDecision(4, 4, Reason.RETRIEVED, "sst2", head="probe", probe="sst2/4")
    shadowed = valves.in_shadow(decided)
    assert (shadowed.reason, shadowed.decided_layer, shadowed.head) == ("shadow", 4, "plain")
    shadowed = valves.in_shadow(decided, "sst2/alone")
    assert (shadowed.reason, shadowed.probe) == ("shadow", "sst2/alone")
    far = replace(decided, reason=Reason.FAR, probe="sst2/alone")
    assert valves.in_shadow(far, "sst2/alone") is far
    full = ExitDecision.full(4, Reason.FAR, task="sst2")
    assert valves.in_shadow(full) is full


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shadow", [False, True])
def test_a_drawn_prompt_runs_at_both_depths_and_is_compared(stream, shadow):
    server = Server(sample_full=1.0, shadow=shadow, head="plain")
    server.engine.tokens = lambda layer: (1, 2, 3, 4) if layer == 5 else (1, 9)
    server.post(prompt=["a It was", "b"], stream=stream, **ALLOWED)
    run, other = (NUM_LAYERS, 5) if shadow else (5, NUM_LAYERS)
    assert server.exit_layers() == [run, NUM_LAYERS, other]
    assert len(set(server.engine.request_ids)) == 3
    assert server.value("raee_reruns_total", outcome="compared") == 1
    assert server.value("raee_agreement_sum", task="sst2") == 0.25
    assert server.value("raee_agreement_count", task="-") is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_label_is_compared_with_the_one_at_full_depth(stream):
    server = Server(sample_full=1.0)
    server.post(prompt="film", raee={"task": "sst2"}, temperature=None, stream=stream)
    probes = [params.extra_args[PROBE_KEY] for params in server.engine.params]
    assert probes == [[PROBES.id, "sst2/5"], [PROBES.id, "sst2/alone"]]
    assert server.value("raee_agreement_sum", task="sst2") == 1
    server.decision = ExitDecision.full(NUM_LAYERS, Reason.FAR, task="sst2")
    server.post(prompt="film", raee={"task": "sst2"})
    assert len(server.engine.params) == 3  # there is nothing to compare with


def test_the_draw_is_seeded_and_a_share():
    def drawn(seed):
        server = Server(sample_full=0.3, seed=seed)
        for _ in range(40):
            server.post(prompt="a It was", **ALLOWED)
        return [layer == NUM_LAYERS for layer in server.exit_layers()]

    assert drawn(1) == drawn(1) != drawn(2)
    assert 4 <= sum(drawn(1)) <= 20


def test_sampled_answers_are_not_compared():
    server = Server(sample_full=1.0)
    server.post(prompt="a It was", temperature=1.0, **ALLOWED)
    assert server.exit_layers() == [5]
    assert server.value("raee_reruns_total", outcome="not-greedy") == 1


def test_a_second_run_that_fails_harms_nobody():
    server = Server(sample_full=1.0, head="plain")

    def tokens(layer):
        if layer == NUM_LAYERS:
            raise RuntimeError("engine")
        return (1,)

    server.engine.tokens = tokens
    assert server.post(prompt="a It was", **ALLOWED).status_code == 200
    assert server.value("raee_reruns_total", outcome="failed") == 1
    assert server.value("raee_agreement_count", task="sst2") is None


def test_beyond_its_room_what_is_drawn_is_dropped():
    server = Server(sample_full=1.0)
    server.post(prompt=["a It was"] * (MAX_RUNNING + 3), **ALLOWED)
    assert server.value("raee_reruns_total", outcome="busy") == 3
    assert server.value("raee_reruns_total", outcome="compared") == MAX_RUNNING


def test_an_answer_that_is_not_finished_is_not_run_again():
    server = Server(sample_full=1.0, head="plain")

    def tokens(layer):
        raise RuntimeError("engine")

    server.engine.tokens = tokens
    with pytest.raises(RuntimeError):
        server.post(prompt="a It was", **ALLOWED)
    assert server.exit_layers() == [5]


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [((), (), 1), ((1,), (1,), 1), ((1,), (2,), 0), ((1, 2), (1, 2, 3, 4), 0.5), ((1,), (), 0)],
)
def test_agreement_is_the_common_beginning(one, other, share):
    assert agreement(one, other) == share
