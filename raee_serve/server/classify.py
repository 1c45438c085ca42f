"""POST /v1/raee/classify: texts in, labels out, for whoever wants a classifier and not a prompt."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from raee_serve.errors import TaskError
from raee_serve.server.depths import RequestDepths, request_depths
from raee_serve.server.engine_client import DepthClient
from raee_serve.server.explain import of_prompt, rounded
from raee_serve.server.gate import Admitted, Gate
from raee_serve.server.options import OptionError, RequestError, shown
from raee_serve.server.prompts import Kind, is_text
from raee_serve.tasks.prompts import ChatPrompt, Rendered

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

OPTIONS = ("task", "exit_layer", "head", "budget", "explain")
"""Fields that mean what they mean in a `raee` object."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """options: as a `raee` object. prompts, token_ids: one per text."""

    task: str
    kind: Kind
    options: dict[str, Any]
    prompts: Sequence[Rendered]
    token_ids: Sequence[list[int]]


async def classify(client: DepthClient, body: dict[str, Any]) -> dict[str, Any]:
    """The label of each text, and the labels' probabilities; null where the LM head answers.

    Raises RequestError for a body that cannot be answered, VLLMError as the engine does.
    """
    gate = client.gate
    with gate.in_use():
        asked = await asyncio.to_thread(_asked, gate, body)
        admitted = await _admitted(gate, asked)
        depths = RequestDepths(admitted.depths(wants_labels=True))
        with request_depths(depths):
            outputs = await _run(client, gate, asked)
        gate.metrics.record(admitted.decisions)
        if gate.sampler is not None:
            gate.sampler.submit(depths.reruns)
    data = [_datum(gate, asked, admitted, depths, n, out) for n, out in enumerate(outputs)]
    return {
        "object": "list",
        "model": next(iter(gate.admission.served_names), None),
        "data": data,
        "usage": _usage(outputs),
    }


def _asked(gate: Gate, body: dict[str, Any]) -> _Asked:
    """The body, checked, with its texts in the task's template. Raises RequestError."""
    allowed = (*OPTIONS, "input")
    if unknown := [field for field in body if field not in allowed]:
        field = shown(unknown[0])
        raise RequestError(field[1:-1], f"there is no field {field}; allowed: {', '.join(allowed)}")
    name, labels = body.get("task"), gate.admission.labels
    if not isinstance(name, str) or not (name in labels and gate.admission.heads_of(name)):
        raise RequestError(
            "task", f"task is {shown(name)}; allowed: {', '.join(sorted(labels)) or 'none here'}"
        )
    texts, task = _texts(body.get("input"), gate.access.max_prompts), gate.admission.tasks[name]
    prompts = [task.render(text) for text in texts]
    try:
        token_ids = [gate.encode(prompt) for prompt in prompts]
    except TaskError as error:
        raise RequestError("task", str(error)) from error
    kind: Kind = "chat" if isinstance(task.prompt, ChatPrompt) else "completions"
    options = {field: body[field] for field in OPTIONS if field in body}
    return _Asked(name, kind, options, prompts, token_ids)


def _texts(value: Any, most: int) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not 1 <= len(texts) <= most:
        given = f"a list of {len(texts)}" if isinstance(texts, list) else shown(value)
        raise RequestError(
            "input", f"input is {given}; allowed: a text, or 1..{most} of them (--max-prompts)"
        )
    for n, text in enumerate(texts):
        if not (isinstance(text, str) and text.strip() and is_text(text)):
            place = f"input[{n}]" if isinstance(value, list) else "input"
            raise RequestError("input", f"{place} is {shown(text)}; allowed: a text, not empty")
    return texts


async def _admitted(gate: Gate, asked: _Asked) -> Admitted:
    """Decided as a completion or chat that names the task is. Raises RequestError."""
    try:
        return await gate.admit_rendered(asked.kind, {"raee": asked.options}, asked.prompts)
    except OptionError as error:
        field = (error.parameter or "").removeprefix("raee.")
        raise RequestError(field, str(error).replace("raee.", "")) from error


async def _run(client: DepthClient, gate: Gate, asked: _Asked) -> list[RequestOutput]:
    """One output per text. What is under way ends where one of them fails."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        # For the LM head; a probe has no use for it.
        allowed_token_ids=list(gate.admission.labels[asked.task].plain_token_ids) or None,
    )
    base = f"classify-{uuid.uuid4()}"
    started = [
        client.generate(tokens_input(ids), params, f"{base}-{n}")
        for n, ids in enumerate(asked.token_ids)
    ]
    answers = [asyncio.ensure_future(_last(outputs)) for outputs in started]
    try:
        return await asyncio.gather(*answers)
    finally:
        for answer in answers:
            answer.cancel()


async def _last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    async with aclosing(outputs):
        found = [output async for output in outputs]
    return found[-1]


def _datum(
    gate: Gate,
    asked: _Asked,
    admitted: Admitted,
    depths: RequestDepths,
    position: int,
    output: RequestOutput,
) -> dict[str, Any]:
    decision, outputs = admitted.decisions[position], gate.admission.labels[asked.task]
    probabilities = depths.labels.get(position)
    if probabilities is None:
        label = outputs.names[outputs.plain_token_ids.index(output.outputs[0].token_ids[0])]
    else:
        label = next(iter(probabilities))
    return {
        "index": position,
        "label": label,
        "probabilities": None if probabilities is None else rounded(probabilities),
        "exit_layer": decision.exit_layer,
        "reason": decision.reason.value,
    } | ({"raee": of_prompt(decision)} if admitted.explain else {})


def _usage(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    prompt = sum(len(output.prompt_token_ids or ()) for output in outputs)
    completion = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
