"""Early answers that fall into a loop are begun again at full depth, and no client sees them."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from raee_serve.engine.settings import EXIT_LAYER_KEY, exit_args
from raee_serve.errors import RaeeError
from raee_serve.records import ExitDecision, Reason
from raee_serve.server.loop_guard import watches, without_loops
from raee_serve.server.loops import MIN_TOKENS, LoopGuard
from raee_serve.server.valves import MAX_WINDOW, Valves
from tests.unit.serving import ALLOWED, DELTA, FINAL_ONLY, NUM_LAYERS, Server, request_output

pytestmark = pytest.mark.unit

CUMULATIVE = RequestOutputKind.CUMULATIVE
WINDOW, EARLY, FULL = 24, 3, 30
SOUND = list(range(100, 140))
OTHER = list(range(200, 240))
LOOPING = [7, *[1, 2, 3] * 12]
LATE_LOOP = SOUND + LOOPING


class Engine:
    """Generates, for each exit layer, completions of these tokens, a token of each in turn.

    log: what was started, yielded and aborted, in order.
    """

    def __init__(self, answers):
        self.answers, self.log = answers, []

    async def start(self, params):
        layer = params.extra_args[EXIT_LAYER_KEY]
        self.log.append(("start", layer))
        texts = self.answers[layer]
        assert len(texts) == params.n
        try:
            for output in self.outputs(texts, params.output_kind):
                await asyncio.sleep(0)
                self.log.append(("tokens", layer))
                yield output
        except GeneratorExit:
            self.log.append(("abort", layer))
            raise

    def outputs(self, texts, kind):
        if kind is FINAL_ONLY:
            output = request_output(texts[0], finished=True)
            for index, text in enumerate(texts[1:], 1):
                output.outputs += request_output(text, index=index, finished=True).outputs
            return [output]
        lengths = [len(text) for text in texts]
        steps = [(end, i) for end in range(1, max(lengths) + 1) for i in range(len(texts))]
        steps = [(end, index) for end, index in steps if end <= lengths[index]]
        return [
            request_output(
                texts[index][end - 1 if kind is DELTA else 0 : end],
                index=index,
                finished=end == lengths[index],
                all_finished=(end, index) == steps[-1],
            )
            for end, index in steps
        ]

    def count(self, *entry):
        return self.log.count(entry)


def guarded(early, full=None, *, kind, window=WINDOW, take=None, **settings):
    """(engine, outputs, restarts) of a request whose answers at both depths are these."""
    engine, restarts = Engine({EARLY: early, FULL: full}), []

    def params(layer):
        own = SamplingParams(n=len(early), max_tokens=999, extra_args=exit_args(layer), **settings)
        own.output_kind = kind
        return own

    async def run():
        outputs = []
        source = without_loops(
            engine.start, params(EARLY), params(FULL), window, lambda: restarts.append(1)
        )
        async with aclosing(source):
            async for output in source:
                engine.log.append("passed")
                outputs.append(output)
                if len(outputs) == take:
                    break
        return outputs

    return engine, asyncio.run(run()), len(restarts)


def tokens(outputs, kind, index=0):
    """Of one completion, as an endpoint puts them together."""
    own = [list(c.token_ids) for o in outputs for c in o.outputs if c.index == index]
    return [token for part in own for token in part] if kind is DELTA else own[-1]


KINDS = pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL_ONLY], ids=lambda k: k.name)
STREAMS = pytest.mark.parametrize("kind", [DELTA, CUMULATIVE], ids=lambda kind: kind.name)


@KINDS
@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 40])
def test_a_sound_answer_is_as_without_the_guard(kind, length):
    text = SOUND[:length]
    engine, outputs, restarts = guarded([text], kind=kind)
    expected = Engine({}).outputs([text], kind)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [
        list(o.outputs[0].token_ids) for o in expected
    ]
    assert [o.finished for o in outputs] == [o.finished for o in expected]
    assert [o.outputs[0].finish_reason for o in outputs] == [
        o.outputs[0].finish_reason for o in expected
    ]
    assert restarts == 0 and engine.count("abort", EARLY) == engine.count("start", FULL) == 0


@KINDS
def test_a_loop_is_aborted_at_once_and_the_answer_is_full_depths(kind):
    engine, outputs, restarts = guarded([LOOPING], [SOUND], kind=kind)
    assert tokens(outputs, kind) == SOUND
    assert [list(o.outputs[0].token_ids) for o in outputs] == [
        list(o.outputs[0].token_ids) for o in Engine({}).outputs([SOUND], kind)
    ]
    assert engine.log.index(("abort", EARLY)) < engine.log.index(("start", FULL))
    assert engine.count("tokens", EARLY) == 1 + MIN_TOKENS
    assert engine.log.index("passed") > engine.log.index(("start", FULL))
    assert restarts == 1


@KINDS
def test_it_is_restarted_once_and_no_more(kind):
    _, outputs, restarts = guarded([LOOPING], [LOOPING], kind=kind)
    assert tokens(outputs, kind) == LOOPING and restarts == 1


@STREAMS
def test_a_stream_is_the_window_behind_until_it_is_past_it(kind):
    engine, outputs, _ = guarded([SOUND], kind=kind)
    assert engine.log[: engine.log.index("passed")].count(("tokens", EARLY)) == WINDOW
    assert engine.log[-1] == "passed" and len(outputs) == len(SOUND)


@STREAMS
def test_what_loops_past_the_window_goes_on(kind):
    _, outputs, restarts = guarded([LATE_LOOP], kind=kind)
    assert tokens(outputs, kind) == LATE_LOOP and restarts == 0


def test_a_whole_answer_is_watched_to_its_end():
    engine, outputs, restarts = guarded([LATE_LOOP], [SOUND], kind=FINAL_ONLY)
    assert tokens(outputs, FINAL_ONLY) == SOUND and restarts == 1
    assert engine.count("tokens", EARLY) == len(SOUND) + 1 + MIN_TOKENS


@KINDS
def test_a_loop_in_the_last_token_counts(kind):
    _, outputs, restarts = guarded([[5] * MIN_TOKENS], [SOUND], kind=kind)
    assert tokens(outputs, kind) == SOUND and restarts == 1


@KINDS
def test_of_several_completions_one_that_loops_restarts_all(kind):
    _, outputs, restarts = guarded([SOUND, LOOPING], [OTHER, SOUND[:3]], kind=kind)
    assert [tokens(outputs, kind, i) for i in (0, 1)] == [OTHER, SOUND[:3]] and restarts == 1


@KINDS
@pytest.mark.parametrize("lengths", [(40, 2), (2, 40), (30, 35)])
def test_several_sound_completions_come_as_they_are(kind, lengths):
    texts = [SOUND[: lengths[0]], OTHER[: lengths[1]]]
    _, outputs, restarts = guarded(texts, kind=kind)
    assert [tokens(outputs, kind, i) for i in (0, 1)] == texts and restarts == 0
    assert [o.finished for o in outputs].count(True) == 1 and outputs[-1].finished
    if kind is FINAL_ONLY:
        assert [c.index for c in outputs[0].outputs] == [0, 1] and len(outputs) == 1


@STREAMS
def test_streams_wait_for_the_shortest_completion(kind):
    """A stream of several completions cannot be begun again once one of them was sent."""
    engine, _, _ = guarded([SOUND[:4], OTHER], kind=kind)
    assert engine.log[: engine.log.index("passed")].count(("tokens", EARLY)) == 4 + WINDOW


def test_several_tokens_in_one_output_are_all_read():
    engine = Engine({FULL: [SOUND]})

    async def early(params):
        if params.extra_args[EXIT_LAYER_KEY] == FULL:
            async for output in engine.start(params):
                yield output
            return
        for first in range(0, 40, 5):
            yield request_output(LOOPING[first : first + 5], finished=first == 35)

    async def run():
        both = [SamplingParams(extra_args=exit_args(layer)) for layer in (EARLY, FULL)]
        for params in both:
            params.output_kind = DELTA
        return [o async for o in without_loops(early, *both, WINDOW, lambda: None)]

    assert tokens(asyncio.run(run()), DELTA) == SOUND


@pytest.mark.parametrize(("text", "take"), [(SOUND, WINDOW - 1), (SOUND, 30), (LOOPING, 5)])
def test_a_client_that_leaves_stops_what_runs(text, take):
    engine, _, _ = guarded([text], [SOUND], kind=DELTA, take=take)
    last = FULL if text is LOOPING else EARLY
    assert engine.count("abort", last) == 1
    assert engine.count("start", EARLY) == 1


def test_a_cancelled_request_stops_what_runs():
    engine = Engine({EARLY: [SOUND * 100]})

    async def run():
        params = SamplingParams(extra_args=exit_args(EARLY), output_kind=FINAL_ONLY)
        source = without_loops(engine.start, params, params, WINDOW, lambda: None)
        task = asyncio.create_task(anext(source))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert engine.count("start", EARLY) == 1 and "passed" not in engine.log


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
def test_an_engine_that_fails_fails_the_request(kind):
    async def start(params):
        yield request_output([1])
        raise RuntimeError("engine")

    async def run():
        params = SamplingParams(extra_args=exit_args(EARLY))
        params.output_kind = kind
        return [o async for o in without_loops(start, params, params, WINDOW, lambda: None)]

    with pytest.raises(RuntimeError, match="engine"):
        asyncio.run(run())


def test_what_cannot_be_caught_is_not_held_back():
    guard = LoopGuard(WINDOW, "xsum")
    stream = SamplingParams(max_tokens=500)
    stream.output_kind = DELTA
    whole = SamplingParams(max_tokens=500, output_kind=FINAL_ONLY)
    short = SamplingParams(max_tokens=MIN_TOKENS - 1)
    assert watches(guard, stream) and watches(guard, whole) and not watches(guard, short)
    no_streams = LoopGuard(0, "xsum")
    assert not watches(no_streams, stream) and watches(no_streams, whole)


RETRIEVED = ExitDecision(EARLY, FULL, Reason.RETRIEVED, "xsum")
OVERRIDE = ExitDecision(EARLY, FULL, Reason.OVERRIDE)


@pytest.mark.parametrize(
    ("valves", "decision", "asked", "is_free", "watched"),
    [
        ({}, RETRIEVED, None, True, True),
        ({}, RETRIEVED, False, True, False),
        ({}, RETRIEVED, None, False, False),  # label words
        ({}, RETRIEVED, True, False, True),
        ({}, OVERRIDE, None, True, False),  # who fixes a depth gets that depth
        ({}, OVERRIDE, True, True, True),
        ({"loop_guard": False}, RETRIEVED, None, True, False),
        ({"loop_guard": False}, RETRIEVED, True, True, True),
        ({"shadow": True}, RETRIEVED, True, True, False),
        ({}, ExitDecision.full(FULL, Reason.FAR), True, True, False),
        ({}, replace(RETRIEVED, head="probe", probe="xsum/5"), True, True, False),
    ],
)
def test_who_is_watched(valves, decision, asked, is_free, watched):
    guard = Valves(**valves).guard(decision, asked, is_free)
    assert (guard is not None) == watched
    assert guard is None or guard == LoopGuard(32, decision.task or "-")


@pytest.mark.parametrize("window", [-1, 1, MIN_TOKENS - 1, MAX_WINDOW + 1])
def test_a_window_that_catches_nothing_is_refused(window):
    with pytest.raises(RaeeError, match=f"--loop-window is {window}; allowed: 16..4096, or 0"):
        Valves(loop_window=window)


ASKED = {"exit_layer": 5, "loop_guard": True}


@pytest.fixture
def server():
    """An application whose answers loop at exit layer 5, and nowhere else."""
    server = Server()
    server.engine.tokens = lambda layer: LOOPING if layer == 5 else SOUND
    return server


@pytest.mark.parametrize("stream", [False, True])
def test_through_the_front_end(server, stream):
    answer = server.post(prompt="a", raee={**ASKED, "explain": True}, stream=stream)
    full = server.post(prompt="a", raee={"exit_layer": "full"}, stream=stream)
    assert server.exit_layers() == [5, NUM_LAYERS, NUM_LAYERS]
    assert answer.headers["x-raee-exit-layer"] == "5"  # the decision
    assert '"restarted":true' in answer.text and '"restarted"' not in full.text
    assert full.text.split("]")[0] in answer.text  # the same tokens
    assert server.value("raee_guard_restarts_total", task="-") == 1
    first, second, _ = server.engine.request_ids
    assert first == second


@pytest.mark.parametrize("raee", [{"exit_layer": 5}, {**ASKED, "loop_guard": False}])
def test_a_depth_that_was_asked_for_is_run_unless_the_guard_is_too(server, raee):
    server.post(prompt="a", raee=raee)
    assert server.exit_layers() == [5]
    assert server.value("raee_guard_restarts_total", task="-") is None


def test_labels_are_not_watched_unless_the_lm_head_answers_and_it_is_asked_for(server):
    asked = {"loop_guard": True}
    server.post(prompt="a It was", raee=asked, **ALLOWED)
    assert server.exit_layers() == [5]  # by probe: one label
    server.engine.params.clear()
    server.post(prompt="a It was", raee={"head": "plain"}, **ALLOWED)
    assert server.exit_layers() == [5]
    server.post(prompt="a It was", raee={"head": "plain", **asked}, **ALLOWED)
    assert server.exit_layers() == [5, 5, NUM_LAYERS]
    assert server.value("raee_guard_restarts_total", task="sst2") == 1
    assert server.engine.params[-1].logit_bias is None


def test_the_prompts_that_were_restarted_are_named(server):
    server.engine.tokens = lambda layer: SOUND
    whole = server.engine.outputs

    def outputs(params):
        is_second = len(server.engine.params) == 2
        server.engine.tokens = lambda layer: LOOPING if is_second and layer == 5 else SOUND
        return whole(params)

    server.engine.outputs = outputs
    raee = server.post(prompt=["a", "b", "c"], raee={**ASKED, "explain": True}).json()["raee"]
    assert ["restarted" in prompt for prompt in raee["prompts"]] == [False, True, False]


def test_what_the_guard_gave_is_what_is_compared():
    server = Server(sample_full=1.0)
    server.engine.tokens = lambda layer: LOOPING if layer == 5 else SOUND
    server.post(prompt="a", raee=ASKED)
    assert server.exit_layers() == [5, NUM_LAYERS, NUM_LAYERS]
    assert server.value("raee_agreement_sum", task="-") == 1


@pytest.mark.parametrize("value", [1, "on", [], 0.5])
def test_a_bad_wish_is_refused(value):
    answer = Server().post(prompt="a", raee={"loop_guard": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "raee.loop_guard"


def test_beam_search_is_left_alone(server):
    server.post(prompt="a", raee=ASKED, use_beam_search=True)
    assert server.exit_layers() == [5]


def test_flags():
    def made(**flags):
        args = SimpleNamespace(min_exit_layer=[], shadow=False, sample_full=0.0, **flags)
        return Valves.of(args)

    off = made(loop_guard="off", loop_window=0)
    assert (off.loop_guard, off.loop_window) == (False, 0)
    assert str(off) == "no loop guard; loop window 0"
    assert str(made(loop_guard="on", loop_window=32)) == "none"
