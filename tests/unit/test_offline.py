"""`raee-serve eval --offline` on a tiny random backbone with the real encoder."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raee_serve.cli import main
from raee_serve.cut import cut_checkpoint
from raee_serve.errors import RaeeError
from raee_serve.evaluation import probed
from raee_serve.evaluation.baselines import LABEL_VOTE, WEIGHED_VOTE, baselines
from raee_serve.evaluation.offline import STORED, answers
from raee_serve.evaluation.probed import KnownVectors, ProbeCache, ProbedTask
from raee_serve.fingerprint import identify_backbone
from raee_serve.retrieval.aggregate import RULES
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.shortcuts import FILE_NAME
from raee_serve.table.datasets import Example
from raee_serve.table.schema import RuleChoice, TaskEntry
from raee_serve.table.store import ExitTable
from raee_serve.table.tasks import get_task
from tests.tiny import random_shortcuts, tokenized_llama
from tests.unit.table_rows import ENCODER, label_rows, unit_vectors

pytestmark = pytest.mark.unit

SST2 = get_task("sst2")
NOUNS = ("film", "plot", "cast", "score", "end", "scene", "idea", "tale", "joke", "song")
TRAIN = [Example(f"{a} {n}", int(a == "fine")) for a in ("fine", "dull") for n in NOUNS]
TEST = [Example(f"a rather {e.text}", e.gold) for e in TRAIN[::3]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2):
    return tokenized_llama(tmp_path_factory.mktemp("llama") / "tiny", smollm2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "sst2").mkdir()
    for split, examples in (("train", TRAIN), ("test", TEST)):
        lines = [json.dumps({"text": e.text, "label": e.gold}) for e in examples]
        (root / "sst2" / f"{split}.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def uri(checkpoint, data, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("table") / "exits")
    command = ["build", "--model", str(checkpoint), "--task", "sst2", "--table", uri]
    assert main([*command, "--data", str(data)]) == 0
    return uri


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAEE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ask(checkpoint, uri, data, capsys):
    """Runs the command with further arguments; its exit code, tables, JSON and errors."""

    def ask(*more, table=uri):
        command = ["eval", "--offline", "--model", str(checkpoint), "--table", table]
        code = main([*command, "--data", str(data), "--task", "sst2", *more])
        out, err = capsys.readouterr()
        return code, out, json.loads(out.splitlines()[-1]) if code == 0 else None, err

    return ask


@pytest.fixture
def asked(cache, checkpoint, uri):
    metadata = ExitTable.open(uri).metadata
    return ProbeCache(checkpoint, metadata.backbone, metadata.encoder, "minilm").of(SST2, TEST)


def test_every_rule_stands_beside_what_needs_none(cache, ask):
    code, out, found, _ = ask()
    assert code == 0
    ways = found["tasks"]["sst2"]["ways"]
    baseline_names = list(ways)[len(RULES) :]
    assert tuple(ways)[: len(RULES)] == tuple(RULES)
    assert baseline_names[0] == "full depth" and baseline_names[-2:] == [LABEL_VOTE, WEIGHED_VOTE]
    for rule in RULES:
        table = next(part for part in out.split("\n\n") if f"rule {rule} " in part)
        assert all(name in table for name in (*baseline_names, "share retrieved", "depth"))
        assert re.search(rf"{rule} against {LABEL_VOTE}: [+-]0\.\d+ \[.*\], p = ", table)
        assert sum(ways[rule]["reasons"].values()) == len(TEST)
        assert set(found["against_votes"][rule]) == {LABEL_VOTE, WEIGHED_VOTE}


def test_answers_are_those_of_the_cut_checkpoint_with_the_heads_biases(
    asked, checkpoint, uri, tmp_path
):
    metadata = ExitTable.open(uri).metadata
    known = KnownVectors(metadata.encoder, [asked])
    retriever = ExitRetriever.open(
        uri, backbone=identify_backbone(checkpoint), encoder=known, max_distance=2.0
    )
    labels = list(metadata.tasks["sst2"].label_token_ids)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for rule in ("earliest", "fused"):
        found = answers(retriever, SST2, asked, rule, None)
        lookups = [Lookup(("sst2",), example.text, rule=rule) for example in TEST]
        for i, decision in enumerate(retriever.decide(lookups)):
            cut = tmp_path / f"{decision.exit_layer}"
            if not cut.exists():
                cut_checkpoint(checkpoint, decision.exit_layer, cut)
            model = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32)
            prompt = tokenizer(SST2.render(TEST[i].text), return_tensors="pt")
            with torch.inference_mode():
                logits = model(**prompt).logits[0, -1, labels].numpy()
            biased = logits + np.array(decision.label_bias or [0.0] * len(labels))
            assert found.predicted[i] == biased.argmax()
        layers = [decision.exit_layer for decision in retriever.decide(lookups)]
        assert found.depth == pytest.approx(np.mean(layers) / retriever.num_layers)


def test_other_settings_cost_no_model(cache, ask, monkeypatch):
    first = ask("--rule", "fused")[2]

    def refuse(*_args, **_options):
        raise AssertionError("a model is loaded though every row is known")

    monkeypatch.setattr(probed, "LayerProbe", refuse)
    monkeypatch.setattr(probed, "Encoder", refuse)
    assert ask("--rule", "fused")[2] == first
    assert ask("--rule", "fused", "--vote-weight", "9", "--fraction", "0.5", "--k", "3")[0] == 0
    assert ask("--limit", "3")[2]["tasks"]["sst2"]["n"] == 3


def test_prompts_that_are_far_count_at_full_depth(cache, ask):
    found = ask("--rule", "earliest", "--max-distance", "0")[2]["tasks"]["sst2"]["ways"]
    assert found["earliest"]["reasons"] == {"far": len(TEST)}
    assert found["earliest"]["depth"] == 1
    assert found["earliest"]["score"] == found["full depth"]["score"]


def test_a_stored_choice_is_compared_where_there_is_one(cache, ask, uri, tmp_path):
    copy = str(tmp_path / "copy")
    shutil.copytree(uri, copy)
    ExitTable.open(copy).put_choices({"sst2": RuleChoice("published", 3, 1.0, 1.0)})
    ways = ask(table=copy)[2]["tasks"]["sst2"]["ways"]
    published = ask("--rule", "published", "--k", "3", table=copy)[2]["tasks"]["sst2"]["ways"]
    assert ways[STORED] == published["published"]


def test_a_table_with_exit_shortcuts_is_asked_as_one_without(cache, ask, uri, checkpoint, tmp_path):
    copy = str(tmp_path / "copy")
    shutil.copytree(uri, copy)
    shortcuts = random_shortcuts(checkpoint, (2,))
    shortcuts.save(tmp_path / "copy" / FILE_NAME)
    ExitTable.open(copy).put_task(TaskEntry.of(get_task("cnndm"), (), (2, 4), shortcuts))
    assert ask("--rule", "earliest", table=copy)[2] == ask("--rule", "earliest")[2]


def test_baselines_by_hand():
    """Layer 2 is right about every row of the table, layer 4 about none."""
    table = label_rows(
        [str(i) for i in range(40)],
        unit_vectors(40),
        [[0.5, 0.9, 0.5, 0.2]] * 40,
    )
    prompts = ProbedTask(
        [str(i) for i in range(10)], table.golds[:10], table.vectors[:10], table.label_logprobs[:10]
    )
    found = baselines(table, prompts)
    right = {name: (way.predicted == prompts.golds).mean() for name, way in found.items()}
    assert right["full depth"] == 0 and right["best fixed layer, calibrated"] == 1
    assert found["best fixed layer, calibrated"].depth == 0.5
    assert found[LABEL_VOTE].depth == found[WEIGHED_VOTE].depth == 0
    assert right[LABEL_VOTE] > 0.5  # the nearest row of each prompt is itself


def test_vectors_are_known_or_refused():
    prompts = ProbedTask(["a"], np.zeros(1, np.int32), unit_vectors(1), np.zeros((1, 4, 2)))
    known = KnownVectors(ENCODER, [prompts])
    assert known.encode(["a", "a"]).shape == (2, ENCODER.dimension)
    with pytest.raises(RaeeError, match="no vector is known of 'b'"):
        known.encode(["b"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "median"], "unknown rule 'median'"),
        (["--port", "1"], "--port 1 is for a server, which --offline does without"),
        (["--base-url", "http://x"], "--offline needs --table DIR and no --base-url"),
        (["--fraction", "2"], "--fraction is 2"),
        (["--task", "demo_summary"], "demo_summary has free text for an answer"),
        (["--task", "demo_sentiment"], "demo_sentiment is not in .*; those are: sst2"),
    ],
)
def test_what_cannot_be_evaluated_offline_is_one_line(cache, ask, arguments, message):
    code, _, _, told = ask(*arguments)
    assert code == 1 and re.search(message, told)


def test_several_rules_need_no_server(checkpoint, uri, capsys):
    rules = ["--rule", "fused", "--rule", "earliest"]
    command = ["eval", "--model", str(checkpoint), "--table", uri, "--task", "demo_sentiment"]
    assert main([*command, *rules]) == 1
    assert "--rule is given 2 times" in capsys.readouterr().err
