"""An application in the place of vLLM's, with admission around it and an engine that only notes."""

import asyncio
import json
from argparse import Namespace
from dataclasses import replace
from math import log
from types import SimpleNamespace

import httpx
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from raee_serve.engine.settings import EXIT_HEAD_KEY, EXIT_LAYER_KEY
from raee_serve.explanation import Explanation, Neighbour
from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.retriever import ProbeSet
from raee_serve.server.access import Access
from raee_serve.server.admission import Admission
from raee_serve.server.engine_client import DepthClient
from raee_serve.server.gate import Gate
from raee_serve.server.limits import LabelOutputs, Written
from raee_serve.server.lookup import LookupBatcher
from raee_serve.server.metrics import DecisionMetrics
from raee_serve.server.middleware import RaeeMiddleware
from raee_serve.server.reload import Snapshot
from raee_serve.server.sampling import FullDepthSampler
from raee_serve.server.valves import Valves
from raee_serve.tasks.prompts import CompletionPrompt
from raee_serve.tasks.task import Task

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
LOOP = asyncio.new_event_loop()
"""That never runs: fake engines are not shut down by it."""
NUM_LAYERS = 30
TASK = Task("sst2", CompletionPrompt("{text} It was"), ("terrible", "great"))
OWN = (Written(" terrible", (10,)), Written(" great", (11,)))
BARE = (Written("terrible", (8, 81)), Written("great", (9,)))
LABELS = LabelOutputs(
    names=TASK.labels,
    own=OWN,
    spellings={label.text: (n % 2, label) for n, label in enumerate(OWN + BARE)},
    plain_token_ids=(10, 11),
    is_fitted=True,
)
EXPLANATION = Explanation(
    neighbours=(Neighbour("row-a", 0.25, "great"), Neighbour("row-b", 0.5, "terrible")),
    expected={"probe": (0.0,) * 4 + (0.95,) + (0.75,) * (NUM_LAYERS - 5)},
    choice=SimpleNamespace(k=2, budget=0.95),
    max_distance=0.6,
    min_layer=1,
    certainty=0.7,
)
PLAIN = ExitDecision(5, NUM_LAYERS, Reason.RETRIEVED, "sst2", 0.25)
DECISION = replace(PLAIN, head="probe", probe="sst2/5", label_scores=(0.5, -0.5))
PROBES = ProbeSet("set-1", b"packed")


def said(completion):
    """A label's text, or, of the fake engine's own answers, their tokens."""
    return completion.text or str(completion.token_ids)


class FakeEngine:
    """Notes the parameters of every generation, and answers as `tokens` says.

    Requests by probe are answered with the label at place `label`, of probability 0.75.
    """

    vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_logprobs=20))

    def __init__(self):
        self.params, self.request_ids = [], []
        self.tokens = lambda exit_layer: (7, 8)
        self.label = 1

    def generate(self, prompt, sampling_params, request_id, **_):
        self.params.append(sampling_params)
        self.request_ids.append(request_id)
        return self.outputs(sampling_params)

    async def outputs(self, params):
        """One token at a time, or all at once where only the whole answer is wanted."""
        if params.extra_args.get(EXIT_HEAD_KEY) == "probe":
            yield label_output(self.label, params)
            return
        tokens = list(self.tokens(params.extra_args[EXIT_LAYER_KEY]))
        ends = [len(tokens)] if params.output_kind is FINAL_ONLY else range(1, len(tokens) + 1)
        for end in ends:
            await asyncio.sleep(0)
            first = end - 1 if params.output_kind is DELTA else 0
            yield request_output(tokens[first:end], finished=end == len(tokens))


def request_output(tokens, *, index=0, finished=False, all_finished=None):
    """As vLLM gives it, of one completion; all_finished: of all, if there are others."""
    reason = "length" if finished else None
    completion = CompletionOutput(index, "", tokens, None, None, finish_reason=reason)
    is_last = finished if all_finished is None else all_finished
    return RequestOutput("0", None, [1], None, [completion], is_last)


def label_output(label, params):
    """As the engine gives it of a request by probe; the label's place counts from 0, -1 for none.

    There are two labels; the one that was sampled has a probability of 0.75.
    """
    sampled, logprobs = label + 1, None
    if params.logprobs is not None:
        logprobs = {sampled: Logprob(log(0.75), 1)}
        if params.logprobs >= 2:
            logprobs[3 - sampled] = Logprob(log(0.25), 2)
    completions = [
        CompletionOutput(
            index, "", [sampled], 0.0, None if logprobs is None else [logprobs],
            finish_reason="length",
        )
        for index in range(params.n)
    ]  # fmt: skip
    return RequestOutput("0", None, [1, 2, 3], None, completions, True)


class Server:
    """An application in the place of vLLM's: one generation per prompt, one dict for all.

    decision: of every look-up that is made.
    """

    def __init__(
        self,
        *,
        fixed_layer=None,
        api_key=None,
        access=None,
        seed=None,
        shortcut_layers=(),
        head=None,
        served_names=(),
        **valves,
    ):
        self.engine, self.looked_up, self.bodies = FakeEngine(), [], []
        self.decision = DECISION
        self.registry = CollectorRegistry()
        self.metrics = DecisionMetrics(NUM_LAYERS, self.registry)
        tasks, labels = ({}, {}) if fixed_layer else ({"sst2": TASK}, {"sst2": LABELS})
        self.valves = Valves(**valves)
        self.gate = Gate(
            admission=Admission(
                NUM_LAYERS,
                tasks,
                labels,
                fixed_layer=fixed_layer,
                head=head,
                served_names=served_names,
                valves=self.valves,
                shortcut_layers=shortcut_layers,
                probe_set=PROBES.id,
            ),
            lookups=LookupBatcher(self.decide, num_layers=NUM_LAYERS, timeout_s=5),
            detokenize=lambda ids: " ".join("w" for _ in ids) + " It was",
            metrics=self.metrics,
            access=access or Access(),
            sampler=FullDepthSampler(self.valves.sample_full, self.metrics, seed),
            snapshot=Snapshot(3, "b", {"sst2": 8, "mr": 1}),
            probe_set=PROBES,
            encode=lambda prompt: [len(prompt)],
        )
        paths = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
        guard = Middleware(AuthenticationMiddleware, tokens=[api_key] if api_key else [])
        self.app = Starlette(
            routes=[Route(path, self.endpoint, methods=["POST"]) for path in paths],
            middleware=[Middleware(RaeeMiddleware), *([guard] if api_key else [])],
        )
        self.app.state.args = Namespace(
            api_key=[api_key] if api_key else None,
            allowed_origins=["https://page.example"],
            allow_credentials=False,
            allowed_methods=["*"],
            allowed_headers=["*"],
        )
        self.app.state.engine_client = DepthClient(self.engine, self.gate, LOOP)

    def decide(self, lookups):
        self.looked_up += [lookup.key_text for lookup in lookups]
        return [self.decided(lookup) for lookup in lookups]

    def decided(self, lookup):
        decision = PLAIN if lookup.head == "plain" else self.decision
        if lookup.exit_layer is not None:
            probe = f"sst2/{lookup.exit_layer}"
            about = {"exit_layer": lookup.exit_layer, "head": "probe", "probe": probe}
            decision = replace(decision, reason=Reason.OVERRIDE, **about)
        return replace(decision, explanation=EXPLANATION if lookup.explain else None)

    async def endpoint(self, request):
        raw = await request.body()
        self.bodies.append(raw)
        if int(request.headers["content-length"]) != len(raw):
            return JSONResponse("content-length", 500)
        try:
            body = json.loads(raw)
            asked = [body["messages"]] if "messages" in body else body["prompt"]
            prompts = asked if isinstance(asked, list) else [asked]
        except (ValueError, TypeError, KeyError, RecursionError):
            return JSONResponse("no JSON object with a prompt", 400)
        if not all(isinstance(prompt, str | list) for prompt in prompts) or "bad" in prompts:
            return JSONResponse({"error": {"message": "bad prompt"}}, 400)
        return await self.respond(body, prompts, request.app.state.engine_client)

    async def respond(self, body, prompts, client):
        kind = DELTA if body.get("stream") else FINAL_ONLY
        params = SamplingParams(
            extra_args=body.get("vllm_xargs") or {},
            temperature=body.get("temperature") or 0,
            logprobs=body.get("logprobs"),
            output_kind=kind,
            skip_clone=True,
        )
        answers = [client.generate(p, params, f"cmpl-{n}") for n, p in enumerate(prompts)]
        texts = [[said(o.outputs[0]) async for o in answer] for answer in answers]
        if body.get("stream"):
            chunks = [f'data: {{"text":"{part}"}}\n\n' for text in texts for part in text]
            events = [": keep-alive\n\n", *chunks, "data: [DONE]\n\n"]
            return StreamingResponse(iter(events), media_type="text/event-stream")
        return JSONResponse({"choices": texts, "usage": {"total_tokens": 3}})

    def post(self, path="/v1/completions", *, content=None, headers=None, method="POST", **body):
        async def send():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                sent = {"content": content} if content is not None else {"json": body}
                answer = await client.request(method, path, **sent, headers=headers)
            for _ in range(20):  # second runs go on in the background
                await asyncio.sleep(0)
            return answer

        return asyncio.run(send())

    def exit_layers(self):
        return [params.extra_args[EXIT_LAYER_KEY] for params in self.engine.params]

    def value(self, name, **labels):
        return self.registry.get_sample_value(name, labels)


ALLOWED = {"allowed_token_ids": [10, 11]}
"""Limits an output to the task's label words."""
