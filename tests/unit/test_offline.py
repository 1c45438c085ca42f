"""`raee-serve eval --offline` on a tiny random backbone with the real encoder."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raee_serve.cli import main
from raee_serve.cut import cut_checkpoint
from raee_serve.evaluation.offline import Answers, Evaluated, answered, baselines
from raee_serve.evaluation.offline_report import BASELINES, as_json, as_table
from raee_serve.evaluation.probed import LabelRows, Remembering, label_rows
from raee_serve.exits.neighbours import neighbour_votes
from raee_serve.exits.probes import unpacked
from raee_serve.fingerprint import identify_backbone
from raee_serve.records import ExitDecision, Reason
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.table.probe import LayerProbe
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import Example
from raee_serve.tasks.registry import get_task
from tests.tiny import tokenized_llama
from tests.unit.table_rows import ENCODER, made_fit, row_ids, unit_vectors
from tests.unit.table_rows import label_rows as table_rows

pytestmark = pytest.mark.unit

SST2 = get_task("sst2")
NOUNS = ("film", "plot", "cast", "score", "end", "scene", "idea", "tale", "joke", "song", "war")
FINE, DULL = ("fine", "grand", "sweet"), ("dull", "awful", "sad")
TRAIN = [Example(f"{a} {n}", int(a in FINE)) for a in (*FINE, *DULL) for n in NOUNS]
TEST = [Example(f"a rather {e.text}", e.gold) for e in TRAIN[::6]]
BUDGETS = ("0.8", "0.95")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2):
    return tokenized_llama(tmp_path_factory.mktemp("llama") / "tiny", smollm2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """sst2's data, a task whose labels share their first token, and one of free text."""
    root = tmp_path_factory.mktemp("data")
    (root / "sst2").mkdir()
    for split, examples in (("train", TRAIN), ("test", TEST)):
        lines = [json.dumps({"text": e.text, "label": e.gold}) for e in examples]
        (root / "sst2" / f"{split}.jsonl").write_text("\n".join(lines))
        rows = [
            json.dumps({"text": e.text, "kind": f"kind {e.gold}", "more": f"{e.text} again"})
            for e in examples
        ]
        (root / f"{split}.jsonl").write_text("\n".join(rows))
    source = '[data]\ntrain = "train.jsonl"\ntest = "test.jsonl"\ntext = "text"\n'
    kinds = 'name = "kinds"\nprompt = "{text} It was a"\nlabels = ["kind 0", "kind 1"]\n'
    (root / "kinds.toml").write_text(f'{kinds}{source}label = "kind"\n')
    notes = 'name = "notes"\nprompt = "{text}. More:"\n'
    (root / "notes.toml").write_text(f'{notes}{source}reference = "more"\n')
    return root


@pytest.fixture(scope="module")
def build(checkpoint, data):
    def build(uri, *tasks, limit=66):
        named = [part for task in tasks for part in ("--task", task)]
        command = ["build", "--model", str(checkpoint), "--table", str(uri), "--limit", str(limit)]
        assert main([*command, "--data", str(data), *named]) == 0
        return str(uri)

    return build


@pytest.fixture(scope="module")
def uri(build, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    return build(folder / "exits", "sst2", *(str(data / f"{n}.toml") for n in ("kinds", "notes")))


@pytest.fixture
def ask(checkpoint, uri, data, capsys):
    """Runs the command with further arguments; its exit code, tables, JSON and errors."""

    def ask(*more, table=uri, task="sst2"):
        command = ["eval", "--offline", "--model", str(checkpoint), "--table", table]
        code = main([*command, "--data", str(data), "--task", task, *more])
        out, err = capsys.readouterr()
        return code, out, json.loads(out.splitlines()[-1]) if code == 0 else None, err

    return ask


def test_budgets_stand_beside_what_decides_nothing(ask):
    code, out, found, _ = ask("--budgets", *BUDGETS)
    assert code == 0
    assert [own["budget"] for own in found["budgets"]] == [0.8, 0.95]
    assert tuple(found["baselines"]) == BASELINES
    assert all(0 <= accuracy <= 1 for accuracy in found["baselines"].values())
    of_task = found["tasks"]["sst2"]
    for name in ("budgets", "baselines", "published", "verdict"):
        assert of_task[name] == found[name]
    assert of_task["rows"] == len(TEST) and of_task["metric"] == "accuracy"
    assert all(sum(reasons.values()) == len(TEST) for reasons in of_task["reasons"])
    for own in found["budgets"]:
        gain = own["over_logistic_regression"]
        theirs = found["baselines"]["logistic_regression"]
        assert gain["difference"] == pytest.approx(own["accuracy"] - theirs, abs=1e-3)
        assert gain["low"] <= gain["difference"] <= gain["high"]
    assert all(f"\n{name} " in out for name in (*BASELINES, "published", "budget 0.8"))
    assert f"sst2: {found['verdict']}" in out


def test_json_alone_and_fewer_rows(ask):
    code, out, found, _ = ask("--json", "--limit", "3", "--budgets", "0.9")
    assert code == 0 and len(out.splitlines()) == 1
    assert found["tasks"]["sst2"]["rows"] == 3


def test_answers_are_those_of_the_cut_checkpoint_through_the_probe(
    checkpoint, uri, encoder, tmp_path
):
    table = ExitTable.open(uri)
    retriever = ExitRetriever.open(uri, backbone=identify_backbone(checkpoint), encoder=encoder)
    backbone, fit = LayerProbe(checkpoint, torch.float32), table.fit("sst2")
    rows = label_rows(backbone, SST2, table.metadata.tasks["sst2"], fit, TEST)
    asked = [Lookup(("sst2",), e.text, exit_layer=1 + i % 4) for i, e in enumerate(TEST)]
    decisions = retriever.decide(asked)
    found = answered(rows, decisions, rows.alone)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    probes = unpacked(retriever.probe_set.packed)
    for i, decision in enumerate(decisions):
        cut = tmp_path / f"{decision.exit_layer}"
        if not cut.exists():
            cut_checkpoint(checkpoint, decision.exit_layer, cut)
        model = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32)
        prompt = tokenizer(SST2.render(TEST[i].text), return_tensors="pt")
        with torch.inference_mode():
            state = model.model(**prompt).last_hidden_state[0, -1].numpy()
        scores = probes[decision.probe].scores(state) + np.array(decision.label_scores)
        assert found[i] == scores.argmax()
    assert {decision.exit_layer for decision in decisions} == {1, 2, 3, 4}


def test_far_prompts_are_answered_by_the_last_layers_probe(ask, uri, checkpoint, minilm):
    found = ask("--max-distance", "0", "--budgets", "0.9")[2]
    [ours] = found["budgets"]
    assert found["tasks"]["sst2"]["reasons"] == [{"far": len(TEST)}] and ours["depth"] == 1
    table = ExitTable.open(uri)
    entry, fit = table.metadata.tasks["sst2"], table.fit("sst2")
    rows = label_rows(LayerProbe(checkpoint), SST2, entry, fit, TEST)
    known, layer = table.rows("sst2"), fit.layers[-1]
    vectors = Encoder(str(minilm)).encode([example.text for example in TEST])
    votes = neighbour_votes(vectors, np.full(len(TEST), -1), known.vectors, known.golds, 2)
    scores = rows.scores[f"sst2/{layer}"] + fit.front_scores(layer, vectors, votes)
    right = (scores.argmax(axis=1) == rows.golds).mean()
    assert ours["accuracy"] == pytest.approx(right, abs=1e-3)
    assert found["published"] == {"accuracy": found["baselines"]["full"], "depth": 1.0}


def test_labels_that_share_first_tokens_have_no_plain_head(ask, data):
    found = ask("--budgets", "0.9", task=str(data / "kinds.toml"))[2]
    assert found["baselines"]["full"] is found["baselines"]["full_calibrated"] is None
    assert found["published"] == {"accuracy": None, "depth": None}
    assert found["baselines"]["best_fixed_layer"] is not None
    assert found["budgets"][0]["accuracy"] > 0.5


def test_rows_too_few_for_probes_go_by_the_papers_rule(ask, build, data, tmp_path):
    kinds = str(data / "kinds.toml")
    few = build(tmp_path / "few", "sst2", kinds, limit=12)
    found = ask("--budgets", *BUDGETS, table=few)[2]
    assert found["baselines"]["best_fixed_layer"] is None
    ways = {(own["accuracy"], own["depth"]) for own in found["budgets"]}
    assert ways == {tuple(found["published"].values())}
    code, _, _, told = ask(table=few, task=kinds)
    assert code == 1 and "task kinds has no probes (it has 12 rows" in told


def test_free_text_is_measured_by_its_references(ask, data):
    found = ask("--budgets", "0.5", "1.0", "--limit", "4", task=str(data / "notes.toml"))[2]
    of_task = found["tasks"]["notes"]
    assert of_task["metric"] == "quality kept" and of_task["rows"] == 4
    shallow, deep = of_task["budgets"]
    assert shallow["depth"] <= deep["depth"] <= 1
    assert shallow["over_logistic_regression"] is None
    assert found["baselines"] == dict.fromkeys(BASELINES) | {"full": 1.0}


def test_baselines_by_hand():
    """The probe of layer 2 is right about all rows; the plain head prefers the first label."""
    n = 40
    probs = [[0.1, 0.9, 0.1, 0.1]] * n
    table = table_rows(row_ids(n), right=[[0.9, 0.9, 0.9, 0.9]] * n)
    fit = made_fit(table.ids, probs, dimension=ENCODER.dimension)
    right = np.eye(2, dtype=np.float32)[table.golds]
    scores = {f"t/{layer}": right if layer == 2 else 0 * right for layer in fit.layers}
    plain = np.zeros((n, 4, 2), np.float32)
    plain[:, -1, 1] = 1.5 * table.golds - 2
    table.full_logprobs[:] = [0.0, -1.0]
    asked = LabelRows(table.golds, scores, "t/alone", plain)
    found = baselines(table, fit, asked, table.vectors, 2)
    correct = {name: (way[0] == table.golds).mean() for name, way in found.items()}
    assert found["best_fixed_layer"][1] == 0.5 and correct["best_fixed_layer"] == 1
    assert correct["full"] == 0.5 and correct["full_calibrated"] == 1
    assert correct["label_vote"] > 0.5  # the nearest row of each prompt is itself
    assert found["label_vote"][1] == found["logistic_regression"][1] == 0


def test_who_decides_no_probe_is_answered_by_the_one_alone():
    rows = LabelRows(
        np.array([1, 1], np.int32),
        {"t/2": np.array([[0, 1]] * 2, np.float32), "t/alone": np.array([[2, 1]] * 2, np.float32)},
        "t/alone",
        np.array([[[0, 1], [1, 0]]] * 2, np.float32),
    )
    probe = ExitDecision(2, 4, Reason.RETRIEVED, head="probe", probe="t/2", label_scores=(3.0, 0.0))
    full = ExitDecision.full(4, Reason.FAR)
    assert answered(rows, [probe, full], rows.alone).tolist() == [0, 0]
    plain = [ExitDecision(layer, 4, Reason.RETRIEVED) for layer in (1, 2)]
    assert answered(rows, plain, None).tolist() == [1, 0]


def evaluated(name: str, ours: float, theirs: float, n: int = 400) -> Evaluated:
    """A task on which ours and the logistic regression are right so often, mostly together."""

    def way(share: float) -> Answers:
        right = (np.arange(n) < share * n) ^ (np.arange(n) % 97 == int(100 * share))
        return Answers(right, share, 0.25)

    baselines = dict.fromkeys(BASELINES) | {"logistic_regression": way(theirs)}
    return Evaluated(get_task(name), {0.5: way(0.1), 0.98: way(ours)}, None, baselines)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (0.9, 0.8, r"0\.900 at 0\.25 of the layers \(budget 0\.98\), \+0\.100 \[.*\] over a"),
        (0.81, 0.807, r".* \(budget 0\.98\); the difference from .* may be chance"),
        (0.8, 0.82, r"The language model adds nothing here: a linear classifier on embeddings"),
        (0.8, 0.8, r"The language model adds nothing here"),
    ],
)
def test_one_sentence_says_what_the_language_model_adds(ours, theirs, verdict):
    [line] = as_table([evaluated("cr", ours, theirs)]).split("\n\n")[1].splitlines()
    assert re.match(f"cr: {verdict}", line)


def test_tasks_count_alike():
    results = [evaluated("cr", 0.9, 0.8), evaluated("mr", 0.7, 0.8, n=20)]
    found = json.loads(as_json(results))
    assert found["budgets"][1]["accuracy"] == pytest.approx(0.8)
    assert found["baselines"]["logistic_regression"] == pytest.approx(0.8)
    assert found["baselines"]["full"] is None
    assert as_table(results).splitlines()[-1].startswith("mean of 2: 0.800 at 0.25")


def test_each_text_is_embedded_once():
    class Counting:
        dimension, asked = 8, 0

        def encode(self, texts):
            self.asked += len(texts)
            return unit_vectors(len(texts), seed=len(texts[0]))

    counting = Counting()
    remembering = Remembering(counting)
    first = remembering.encode(["a", "b", "a"])
    np.testing.assert_array_equal(remembering.encode(["b", "a"]), first[[1, 0]])
    assert counting.asked == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "1"], "--port 1 is for a server, which --offline does without"),
        (["--base-url", "http://x"], "--offline needs --table DIR and no --base-url"),
        (["--budgets", "0.9", "2"], r"budget 2\.0 is not within \(0, 1\]"),
        (["--task", "demo_sentiment"], "demo_sentiment is not in .*; those are: .*sst2"),
    ],
)
def test_what_cannot_be_evaluated_offline_is_one_line(ask, arguments, message):
    code, _, _, told = ask(*arguments)
    assert code == 1 and re.search(message, told)


def test_several_budgets_need_no_server(checkpoint, uri, capsys):
    command = ["eval", "--model", str(checkpoint), "--table", uri, "--task", "demo_sentiment"]
    assert main([*command, "--budgets", *BUDGETS]) == 1
    assert "--budgets names 2, which only --offline can compare" in capsys.readouterr().err
