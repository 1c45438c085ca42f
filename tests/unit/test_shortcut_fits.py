"""Ways to fit shortcuts: sums of parts are sums of the whole, and each way takes its own."""

import pytest
import torch

from benchmarks.shortcut_fits import Sums, of_rank, up_to_its_end, ways
from raee_serve.shortcuts import Shortcut
from raee_serve.table.shortcuts import NormalEquations

pytestmark = pytest.mark.unit

STATES, LAST = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(1))
PARTS = [
    (task, text, half) for task in "ab" for text in ("references", "own answers") for half in (0, 1)
]


def equations(rows: slice) -> NormalEquations:
    found = NormalEquations()
    found.add(STATES[rows], LAST[rows], torch.ones(len(STATES[rows])))
    return found


def test_parts_add_up_to_the_whole():
    first, second = (
        Sums(equations(slice(a, a + 10)), equations(slice(a + 10, a + 30))) for a in (0, 30)
    )
    answering = torch.tensor(([1.0] * 10 + [0.0] * 20) * 2)
    whole = NormalEquations()
    whole.add(STATES, LAST, 1 + 3 * answering)
    parts = {("a", "references", 0): {2: first}, ("a", "references", 1): {2: second}}
    [way] = [way for way in ways() if way.name == "the task alone"]
    found, expected = way.shortcut(parts, "a", 2), whole.solved(0.01)
    torch.testing.assert_close(found.weight, expected.weight)
    torch.testing.assert_close(found.bias, expected.bias)


@pytest.mark.parametrize(
    ("way", "taken"),
    [
        ("all tasks, references", ["a0", "a1", "b0", "b1"]),
        ("all tasks, half of the documents", ["a0", "b0"]),
        ("the task alone", ["b0", "b1"]),
        ("own answers instead", ["A0", "A1", "B0", "B1"]),
    ],
)
def test_what_a_way_is_fitted_on(way, taken):
    [found] = [own for own in ways() if own.name == way]
    parts = [part for part in PARTS if found.takes(part, "b")]
    names = [
        f"{task if text == 'references' else task.upper()}{half}" for task, text, half in parts
    ]
    assert names == taken


def test_a_rank_is_what_is_left_of_what_the_map_adds():
    draw = torch.Generator().manual_seed(2)
    added = torch.randn(8, 2, generator=draw) @ torch.randn(2, 8, generator=draw)
    shortcut = Shortcut(torch.eye(8) + added, torch.ones(8))
    torch.testing.assert_close(of_rank(shortcut, 2).weight, shortcut.weight, atol=1e-5, rtol=1e-5)
    less = of_rank(shortcut, 1)
    assert torch.linalg.matrix_rank(less.weight - torch.eye(8), atol=1e-4) == 1
    assert torch.equal(less.bias, shortcut.bias)


def test_answers_end_with_the_line_or_the_text():
    class Tokenizer:
        all_special_ids = (0,)

        def decode(self, tokens):
            return {5: " a", 6: "b\n"}.get(tokens[0], "c")

    assert up_to_its_end([5, 7, 0, 5], Tokenizer(), True) == [5, 7]
    assert up_to_its_end([5, 6, 5], Tokenizer(), True) == [5]
    assert up_to_its_end([5, 6, 5], Tokenizer(), False) == [5, 6, 5]
