"""`raee-serve task check`: what a build would make of a task, and what to change before it."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from typing import Any

import numpy as np

from raee_serve.checkpoints import local_checkpoint
from raee_serve.errors import CheckpointError, TaskError
from raee_serve.exits.fit import why_not
from raee_serve.retrieval.encoder import load_model
from raee_serve.table.ray_build import ReadBackbone
from raee_serve.table.rows import ItemMaker
from raee_serve.table.schema import row_id
from raee_serve.tasks.data_files import listed, one_line
from raee_serve.tasks.datasets import Example, Loaded, add_data_argument, load, source_of
from raee_serve.tasks.registry import get_task
from raee_serve.tasks.task import Task, answer_token_ids, prompt_text, prompt_token_ids

DESCRIPTION = """Read a task's data and show a prompt, its tokens, the labels with their rows, texts
that are too long, and what to change. Ends with 1 if no table can be built of it."""
FEW = 5
"""A label with fewer rows is hardly ever a neighbour."""
SHOWN = 2000
"""Characters of the prompt that a reader sees."""


@dataclass(slots=True)
class Report:
    """What was found. window: tokens, and longer: texts beyond it, of the encoder and the model.

    prompt: the first row's, as sent. first_answer: the tokens of its label or reference.
    in_both: training texts that are test texts too. contradicting: texts with several labels.
    faults: why no table can be built; advice: what to change otherwise.
    """

    task: str
    kind: str
    version: str
    data: str
    prompt: Any = None
    prompt_tokens: int = 0
    first_answer: list[str] = field(default_factory=list)
    rows: int = 0
    test_rows: int | None = None
    blank: int = 0
    duplicates: int = 0
    contradicting: int = 0
    in_both: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    few: list[str] = field(default_factory=list)
    encoder: dict[str, int | None] = field(default_factory=dict)
    model: dict[str, int | None] = field(default_factory=dict)
    plain_head: bool | None = None
    no_probes: str | None = None
    faults: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("task", metavar="FILE|NAME", help="task file, or a shipped task")
    parser.add_argument(
        "--model", required=True, help="packaged name, checkpoint directory or hub id"
    )
    parser.add_argument("--encoder", default="minilm", help="packaged name, directory or hub id")
    add_data_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: Namespace) -> int:
    """1 if the task cannot be built. Raises RaeeError for a file or data that cannot be read."""
    task = get_task(args.task)
    train = load(task, "train", args.data)
    source = source_of(task, args.data)
    report = Report(task.name, task.kind, task.version, str(source))
    test = None if source.test is None else load(task, "test", args.data)
    count_rows(report, task, train, test)
    checkpoint = local_checkpoint(args.model)
    try:
        backbone = ReadBackbone(str(checkpoint))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read backbone {args.model}: {one_line(e)}") from e
    show_prompt(report, task, train.examples[0], backbone)
    measure(report, task, train.examples, backbone)
    report.encoder = encoder_window(args.encoder, [e.text for e in train.examples])
    advise(report)
    print(json.dumps(asdict(report)) if args.json else "\n".join(lines(report)))
    return 1 if report.faults else 0


def count_rows(report: Report, task: Task, train: Loaded, test: Loaded | None) -> None:
    """Rows, labels, and texts that stand there more than once."""
    examples = train.examples
    report.rows, report.blank, report.duplicates = len(examples), train.blank, train.duplicates
    texts = {example.text for example in examples}
    if test is not None:
        report.test_rows = len(test.examples)
        report.in_both = len(texts.intersection(example.text for example in test.examples))
    if task.labels:
        answers = Counter(text for text, _ in {(e.text, e.gold) for e in examples})
        report.contradicting = sum(count > 1 for count in answers.values())
        counts = Counter(example.gold for example in examples)
        report.labels = {label: counts[place] for place, label in enumerate(task.labels)}
        report.few = [label for label, count in report.labels.items() if count < FEW]
        golds = {row_id(task.name, e.text, e.gold): e.gold for e in examples}
        report.no_probes = why_not(np.array([*golds.values()], np.int32), [*golds])


def show_prompt(report: Report, task: Task, example: Example, backbone: ReadBackbone) -> None:
    """One prompt and the answer to it, as tokens; what goes wrong is a fault."""
    tokenizer = backbone.tokenizer
    report.prompt = task.render(example.text)
    answer = task.labels[example.gold] if isinstance(example.gold, int) else example.gold
    try:
        report.prompt_tokens = len(prompt_token_ids(tokenizer, report.prompt))
        text = prompt_text(tokenizer, report.prompt)
        ids = answer_token_ids(tokenizer, text, task.answer_text(answer))
        report.first_answer = [tokenizer.decode([token]) for token in ids]
    except TaskError as e:
        report.faults.append(str(e))


def measure(
    report: Report, task: Task, examples: Sequence[Example], backbone: ReadBackbone
) -> None:
    """Every row as a build takes it; the first that it cannot take is a fault."""
    report.model = {"window": backbone.max_length, "longer": 0}
    if report.faults:
        return
    try:
        maker = ItemMaker(task, backbone)
        if task.labels:
            report.plain_head = bool(maker.entry.plain_token_ids)
        report.model["longer"] = sum(maker.item(example).truncated for example in examples)
    except TaskError as e:
        report.faults.append(str(e))


def encoder_window(name: str, texts: Sequence[str]) -> dict[str, int | None]:
    """Its tokens, and how many texts have more; None for an encoder without a limit."""
    encoder = load_model(name)
    window = encoder.max_seq_length
    if window is None or window == float("inf"):
        return {"window": None, "longer": 0}
    lengths = map(len, encoder.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"])
    return {"window": int(window), "longer": sum(length > window for length in lengths)}


def judge_heads(report: Report) -> None:
    """Whether anything could answer: probes, or the plain head."""
    if report.kind == "labels" and report.no_probes and report.plain_head is False:
        report.faults.append(
            f"nothing could answer: no probes, because {report.no_probes}, and the plain head "
            "needs labels that differ in their first token"
        )
    elif report.no_probes and report.plain_head:
        report.advice.append(
            f"the plain head alone will answer: no probes, because {report.no_probes}"
        )


def advise(report: Report) -> None:
    """What to change, in the order in which it matters."""
    say = report.advice.append
    judge_heads(report)
    if isinstance(report.prompt, str) and report.prompt.endswith(" "):
        say("the prompt ends in a space, with which answers begin already; take it away")
    if report.few:
        say(f"labels with fewer than {FEW} rows, add some: {listed(report.few)}")
    if report.contradicting:
        say(f"texts with more than one label, keep one of them: {report.contradicting:,}")
    if report.in_both:
        say(f"training texts that are test texts too, take them out: {report.in_both:,}")
    if report.test_rows is None:
        say("[data] names no test rows, which eval needs; add test = 0.1")
    if report.encoder["longer"]:
        say(
            f"texts longer than the encoder's {report.encoder['window']} tokens: "
            f"{report.encoder['longer']:,}; their neighbours are found by their beginnings, so put "
            "first what tells them apart, or name an encoder with a longer window (--encoder)"
        )
    if report.model["longer"]:
        say(
            f"prompts longer than the model's {report.model['window']} tokens: "
            f"{report.model['longer']:,}; their texts are cut short, so send fewer words (--words)"
        )


def lines(report: Report) -> Iterator[str]:
    """For a reader."""
    yield f"{report.task}: {report.kind}, version {report.version}, data {report.data}"
    yield f"prompt of the first row, {report.prompt_tokens} tokens:"
    yield from (f"  | {line}" for line in _shown(report.prompt).split("\n"))
    yield f"its answer, {len(report.first_answer)} tokens: {listed(report.first_answer) or '-'}"
    tested = "no test rows" if report.test_rows is None else f"{report.test_rows:,} test rows"
    yield (
        f"{report.rows:,} training rows, {tested}; left out for want of a text: "
        f"{report.blank:,}; duplicates: {report.duplicates:,}"
    )
    if report.labels:
        counts = sorted(report.labels.items(), key=lambda item: -item[1])
        shown = f"{len(counts)} labels: " + ", ".join(f"{name} {rows:,}" for name, rows in counts)
        yield from wrap(shown, 100, subsequent_indent="  ")
    if report.plain_head is not None:
        yield f"plain head: labels {'differ' if report.plain_head else 'share first tokens'}"
    for name, limit in (("encoder", report.encoder), ("model", report.model)):
        yield f"{name}: window {limit['window'] or 'unlimited'}, {limit['longer']:,} texts longer"
    yield from (f"change: {advice}" for advice in report.advice)
    yield from (f"cannot be built: {fault}" for fault in report.faults)
    if not report.faults:
        yield "can be built"


def _shown(prompt: Any) -> str:
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    half = SHOWN // 2
    return prompt if len(prompt) <= SHOWN else f"{prompt[:half]}\n...\n{prompt[-half:]}"
