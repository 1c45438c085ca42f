"""Ways to fit exit shortcuts, side by side: on whose text, how much of it, and of how low a rank.

The regression's sums add up: every text goes through the backbone once, and each way is a sum of
parts. All are judged on the same held-out documents, by the agreement with full depth's next token
along given references and along the backbone's own answers, greedy at full depth. In the end, what
the map costs a row that leaves by it.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.machine import machine
from raee_serve.checkpoints import local_checkpoint
from raee_serve.evaluation.documents import WORDS
from raee_serve.evaluation.report import markdown_table
from raee_serve.shortcuts import Shortcut
from raee_serve.table.build import DEFAULT_BATCH_TOKENS
from raee_serve.table.probe import LayerProbe
from raee_serve.table.rows import Item, ItemMaker
from raee_serve.table.shortcuts import (
    ANSWER_WEIGHT,
    Agreement,
    Judge,
    NormalEquations,
    default_layers,
    passes,
)
from raee_serve.tasks.datasets import add_data_argument, shuffled_examples
from raee_serve.tasks.registry import get_task

RIDGE = 0.01
ANSWER_TOKENS = 64
GENERATED_AT_ONCE = 8
RANKS = (32, 128)
TIMED_ROWS = (1, 16, 64)
TIMED_FOR_S = 0.5

Text = Literal["references", "own answers"]
TEXTS: tuple[Text, ...] = ("references", "own answers")


@dataclass(frozen=True, slots=True)
class Sums:
    """Of one part of the text, at one layer: positions that answer, and all others."""

    answers: NormalEquations
    others: NormalEquations

    def __add__(self, more: "Sums") -> "Sums":
        return Sums(self.answers.plus(more.answers), self.others.plus(more.others))

    def solved(self, answer_weight: float) -> Shortcut:
        return self.others.plus(self.answers, answer_weight).solved(RIDGE)


Part = tuple[str, Text, int]
"""Task, text, and which half of its documents."""
Parts = Mapping[Part, Mapping[int, Sums]]
"""Their sums by layer."""


@dataclass(frozen=True, slots=True)
class Way:
    """takes: whether a part is fitted on, to answer prompts of a task; rank: of what the map adds
    to the state, None for full."""

    name: str
    takes: Callable[[Part, str], bool]
    answer_weight: float = ANSWER_WEIGHT
    rank: int | None = None

    def shortcut(self, parts: Parts, task: str, layer: int) -> Shortcut:
        taken = [by_layer[layer] for part, by_layer in parts.items() if self.takes(part, task)]
        found = reduce(Sums.__add__, taken).solved(self.answer_weight)
        return found if self.rank is None else of_rank(found, self.rank)


def ways() -> list[Way]:
    """The first is what `shortcuts fit` does, with one penalty."""

    def all_tasks(part: Part, task: str) -> bool:
        return part[1] == "references"

    return [
        Way("all tasks, references", all_tasks),
        Way("all tasks, half of the documents", lambda p, t: all_tasks(p, t) and p[2] == 0),
        Way("the task alone", lambda p, t: all_tasks(p, t) and p[0] == t),
        Way("own answers instead", lambda p, t: p[1] == "own answers"),
        Way("references and own answers", lambda p, t: True),
        Way("answers count once", all_tasks, answer_weight=1),
        Way("answers count 16 times", all_tasks, answer_weight=16),
        *(Way(f"of rank {rank}", all_tasks, rank=rank) for rank in RANKS),
    ]


def of_rank(shortcut: Shortcut, rank: int) -> Shortcut:
    """The same with the nearest matrix of that rank in what it adds to the state."""
    unchanged = torch.eye(len(shortcut.weight))
    left, sizes, right = torch.linalg.svd(shortcut.weight - unchanged)
    added = left[:, :rank] * sizes[:rank] @ right[:rank]
    return Shortcut(unchanged + added, shortcut.bias)


class Texts:
    """Documents of each task with their references, and with the backbone's own answers."""

    def __init__(self, args: argparse.Namespace, checkpoint: Path, probe: LayerProbe) -> None:
        self._held_out = args.held_out
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=probe.dtype).eval()
        self._items: dict[tuple[str, Text], list[Item]] = {}
        for name in args.task:
            task = get_task(name)
            rows = shuffled_examples(task, "train", args.data, 0, args.words)
            maker = ItemMaker(task, probe)
            items = [maker.item(row) for row in rows[: args.documents + args.held_out]]
            one_line = isinstance(task.render("a text"), str)
            self._items[name, "references"] = items
            self._items[name, "own answers"] = answered(model, probe.tokenizer, items, one_line)

    def parts(self) -> Iterator[tuple[Part, Sequence[Item]]]:
        for (task, text), items in self._items.items():
            half = (self._held_out + len(items)) // 2
            yield (task, text, 0), with_answers(items[self._held_out : half])
            yield (task, text, 1), with_answers(items[half:])

    def held_out(self) -> Iterator[tuple[tuple[str, Text], Sequence[Item]]]:
        for key, items in self._items.items():
            yield key, with_answers(items[: self._held_out])


def with_answers(items: Sequence[Item]) -> list[Item]:
    """A backbone may have nothing to say."""
    return [item for item in items if item.reference]


@torch.inference_mode()
def answered(model: Any, tokenizer: Any, items: Sequence[Item], one_line: bool) -> list[Item]:
    """The items with greedy answers in the place of references; some are empty."""
    found = []
    for first in tqdm(range(0, len(items), GENERATED_AT_ONCE), desc="own answers"):
        batch = items[first : first + GENERATED_AT_ONCE]
        longest = max(len(item.prompt) for item in batch)
        missing = [longest - len(item.prompt) for item in batch]
        padded = [[0] * n + item.prompt for n, item in zip(missing, batch, strict=True)]
        seen = [[0] * n + [1] * len(item.prompt) for n, item in zip(missing, batch, strict=True)]
        output = model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(seen),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
        )
        for item, row in zip(batch, output[:, longest:].tolist(), strict=True):
            found.append(replace(item, reference=up_to_its_end(row, tokenizer, one_line)))
    return found


def up_to_its_end(tokens: Sequence[int], tokenizer: Any, one_line: bool) -> list[int]:
    """Tokens before the first that ends the text, or the line."""
    answer = []
    for token in tokens:
        if token in tokenizer.all_special_ids or (one_line and "\n" in tokenizer.decode([token])):
            break
        answer.append(token)
    return answer


def summed(
    probe: LayerProbe, items: Sequence[Item], layers: Sequence[int], bar: tqdm
) -> dict[int, Sums]:
    sums = {layer: Sums(NormalEquations(), NormalEquations()) for layer in layers}
    every_layer = [*layers, probe.num_layers]
    for states, answering in passes(probe, items, every_layer, DEFAULT_BATCH_TOKENS, bar):
        last = states[probe.num_layers]
        for layer, own in sums.items():
            for equations, chosen in ((own.answers, answering), (own.others, ~answering)):
                once = torch.ones(int(chosen.sum()))
                equations.add(states[layer][chosen], last[chosen], once)
    return sums


def cost(probe: LayerProbe, fitted: Shortcut) -> dict[int, tuple[float, float]]:
    """By number of rows: microseconds of a map, and of the final norm and head, for all of them."""
    shortcut = fitted.to(probe.dtype)
    found = {}
    for rows in TIMED_ROWS:
        states = torch.randn(rows, len(fitted.bias)).to(probe.dtype)
        found[rows] = (
            microseconds(lambda s=states: shortcut(s)),
            microseconds(lambda s=states: probe.top_tokens(s)),
        )
    return found


def microseconds(call: Callable[[], Tensor]) -> float:
    """The median of its runs."""
    times, end = [], time.perf_counter() + TIMED_FOR_S
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[len(times) // 2]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    checkpoint = local_checkpoint(args.model)
    probe = LayerProbe(checkpoint)
    layers = args.layers or default_layers(probe.num_layers)
    texts = Texts(args, checkpoint, probe)
    parts, held_out = dict(texts.parts()), dict(texts.held_out())
    every = [item for own in [*parts.values(), *held_out.values()] for item in own]
    every_layer = [*layers, probe.num_layers]
    with tqdm(total=sum(item.length for item in every), desc="states", unit="token") as bar:
        sums = {part: summed(probe, items, layers, bar) for part, items in parts.items()}
        judges = {
            key: Judge(probe, passes(probe, items, every_layer, DEFAULT_BATCH_TOKENS, bar))
            for key, items in held_out.items()
        }
    rows = [row for layer in layers for row in compared(sums, judges, layer)]
    headings = ("layer", "fitted on", *(f"{text} of {task}" for task, text in judges))
    judged = ", ".join(
        f"{judge.judged} of {text} of {task}" for (task, text), judge in judges.items()
    )
    tokens = sum(item.length for part, own in parts.items() for item in own if part[1] == TEXTS[0])
    print(markdown_table(headings, [tuple(map(_cell, row.values())) for row in rows]))
    print(f"\n{tokens} tokens of documents with references; held-out positions: {judged}")
    costs = cost(probe, ways()[0].shortcut(sums, args.task[0], layers[0]))
    for count, (map_us, head_us) in costs.items():
        print(f"{count} rows: map {map_us:.0f} us, final norm and head {head_us:.0f} us")
    return {"model": args.model, "rows": rows, "cost_us": costs, "machine": machine()}


def compared(
    parts: Parts, judges: Mapping[tuple[str, Text], Judge], layer: int
) -> Iterator[dict[str, Any]]:
    """A row for the plain head, and for each way."""
    plain: dict[str, Any] = {"layer": layer, "way": "(plain head)"}
    by_way: list[dict[str, Any]] = []
    for way in ways():
        row: dict[str, Any] = {"layer": layer, "way": way.name}
        for (task, text), judge in judges.items():
            found: Agreement = judge.agreement(task, layer, way.shortcut(parts, task, layer))
            row[f"{task} {text}"] = found.shortcut
            plain[f"{task} {text}"] = found.plain
        by_way.append(row)
    yield plain
    yield from by_way


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--task", action="append", required=True, help="of free text; repeatable")
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="default: as fit's")
    parser.add_argument("--documents", type=int, default=90, help="a task (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=30, help="besides (default: %(default)s)")
    parser.add_argument("--words", type=int, default=WORDS, help="of each (default: %(default)s)")
    add_data_argument(parser)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    print(machine(), flush=True)
    result = measure(args)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
