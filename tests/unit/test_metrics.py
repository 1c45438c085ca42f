"""Quality of answers, against values worked out by hand."""

import pytest

from raee_serve.evaluation.metrics import accuracy, matthews, predicted_label, rouge_l, score
from raee_serve.tasks.registry import get_task

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("task", "answer", "label"),
    [
        ("sst2", " great", 1),
        ("sst2", "terrible", 0),
        ("sst2", " terr", 0),  # one token of several
        ("sst2", " fine", None),
        ("sst2", "", None),
        ("sst5", " g", None),  # good or great
        ("sst5", " good", 3),
    ],
)
def test_an_answer_is_a_label_word_or_its_unmistakable_beginning(task, answer, label):
    assert predicted_label(get_task(task), answer) == label


def test_accuracy_counts_what_is_no_label_as_wrong():
    assert accuracy([1, None, 0, 1], [1, 0, 0, 0]) == 0.5
    assert accuracy([], []) == 0


def test_matthews():
    # tp 2, tn 1, fp 1, fn 1: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
    assert matthews([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2) == pytest.approx(1 / 6)
    assert matthews([1, 0, 2], [1, 0, 2], 3) == pytest.approx(1)
    assert matthews([1, 0], [0, 1], 2) == pytest.approx(-1)
    assert matthews([1, 1, 1], [1, 0, 1], 2) == 0


def test_rouge_l_is_the_mean_f1_of_the_longest_common_subsequence():
    # 3 of 4 answer words and 3 of 6 reference words in order: F1 of 3/4 and 3/6 is 0.6
    answer, reference = "the cat sat down", "the cat quietly sat there today"
    assert rouge_l([answer], [reference]) == pytest.approx(0.6)
    assert rouge_l([answer, "dogs"], [reference, "a fox"]) == pytest.approx(0.3)


def test_each_task_has_its_metric():
    assert score(get_task("sst2"), [" great", " great"], [1, 0]) == 0.5
    assert score(get_task("cola"), [" correct", " correct"], [1, 0]) == 0
    assert score(get_task("xsum"), ["a fox ran"], ["a fox ran"]) == pytest.approx(1)
