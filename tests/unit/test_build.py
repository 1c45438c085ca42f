"""Building a table from a tiny random backbone with the real encoder, through the command line."""

import dataclasses
import json
from datetime import timedelta

import lancedb
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from raee_serve import cli
from raee_serve.errors import BindingError, TableError, TaskError
from raee_serve.exits.fit import fit_task
from raee_serve.fingerprint import identify_backbone
from raee_serve.records import Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.retrieval.task_index import MIN_BOUND
from raee_serve.table import build as build_module
from raee_serve.table.build import BATCHES_PER_COMMIT, TaskBuilder
from raee_serve.table.probe import LayerProbe
from raee_serve.table.rows import Item, free_text_layers, length_batches
from raee_serve.table.schema import TableMetadata, row_id
from raee_serve.table.states import StateStore
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import Example
from raee_serve.tasks.prompts import CompletionPrompt
from raee_serve.tasks.registry import TASKS, get_task
from raee_serve.tasks.task import Task
from tests.tiny import tokenized_gemma3, tokenized_llama

pytestmark = pytest.mark.unit

REVIEWS = [f"{adjective} {noun}" for adjective in ("fine", "dull") for noun in "abcdefghijkl"]
EXAMPLES = [Example(text, int(text.startswith("fine"))) for text in REVIEWS]
MANY = [Example(f"{e.text} {n}", e.gold) for e in EXAMPLES for n in ("one", "two")]
"""Enough for probes."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2):
    return tokenized_llama(tmp_path_factory.mktemp("llama") / "tiny", smollm2)


class RecordingProbe(LayerProbe):
    """Keeps what it was asked, and fails at the batch it is told to."""

    fail_at: int | None = None

    def label_states(self, prompts, layers, token_ids):
        self.asked = [*getattr(self, "asked", []), list(prompts)]
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        return super().label_states(prompts, layers, token_ids)

    def prompts_asked(self):
        return [prompt for batch in self.asked for prompt in batch]


@pytest.fixture
def probe(checkpoint):
    return RecordingProbe(checkpoint, torch.float32)


@pytest.fixture
def table(tmp_path, checkpoint, encoder):
    metadata = TableMetadata(identify_backbone(checkpoint), encoder.identity())
    return ExitTable.open_or_create(str(tmp_path / "table"), metadata)


def build(task, table, probe, encoder, examples=EXAMPLES, **options):
    """task: itself, or its name."""
    task = get_task(task) if isinstance(task, str) else task
    return TaskBuilder(task, table, probe, encoder, **options).build(examples, progress=False)


def test_rows_hold_what_the_probe_and_the_encoder_say(table, probe, encoder, checkpoint):
    report = build("sst2", table, probe, encoder, store_text=True)
    assert (report.added, report.kept, report.truncated) == (len(EXAMPLES), 0, 0)
    assert "no probes: it has 24 rows" in str(report) and "the plain head answers" in str(report)
    rows = table.rows("sst2")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    labels = [tokenizer(word)["input_ids"][0] for word in (" terrible", " great")]
    assert table.metadata.tasks["sst2"].plain_token_ids == tuple(labels)
    for i, text in enumerate(rows.texts):
        example = EXAMPLES[REVIEWS.index(text)]
        assert rows.golds[i] == example.gold
        assert rows.ids[i] == row_id("sst2", text, example.gold)
        prompt = tokenizer(f"{text} It was")["input_ids"]
        states, logprobs = (own[0] for own in probe.label_states([prompt], (1, 2, 3, 4), labels))
        right = logprobs.argmax(axis=1) == example.gold
        expected = np.where(right, np.exp(logprobs[:, example.gold]), 0)
        np.testing.assert_allclose(rows.plain_probs[i], expected, atol=1e-4)
        np.testing.assert_allclose(rows.full_logprobs[i], logprobs[-1], atol=1e-4)
        stored = table.states("sst2", [rows.ids[i]])[:, 0]
        np.testing.assert_allclose(stored, states, atol=2e-2)
    np.testing.assert_allclose(rows.vectors, encoder.encode(rows.texts), atol=1e-5)


def test_texts_are_not_kept_unless_asked_for(table, probe, encoder):
    build("sst2", table, probe, encoder, EXAMPLES[:2])
    assert table.rows("sst2").texts == [None, None]


def test_chat_prompts_go_through_the_chat_template(table, probe, encoder, checkpoint):
    build("demo_chat_sentiment", table, probe, encoder, EXAMPLES[:1])
    task = get_task("demo_chat_sentiment")
    expected = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(
        task.render(REVIEWS[0]), add_generation_prompt=True, return_dict=False
    )
    assert probe.prompts_asked()[0] == expected


def test_interrupted_build_resumes_without_duplicates(table, probe, encoder):
    probe.fail_at = BATCHES_PER_COMMIT + 2
    with pytest.raises(KeyboardInterrupt):
        build("sst2", table, probe, encoder, batch_tokens=10)
    done = table.count_rows()
    assert 0 < done < len(EXAMPLES)
    probe.fail_at, probe.asked = None, []
    report = build("sst2", table, probe, encoder, batch_tokens=10)
    assert (report.added, report.kept) == (len(EXAMPLES) - done, done)
    ids = table.rows("sst2").ids
    assert len(ids) == len(set(ids)) == len(EXAMPLES)
    # Rows that were there are not computed again: the rest once, and again on the timed batches.
    asked = {tuple(prompt) for prompt in probe.prompts_asked()}
    assert len(asked) == len(EXAMPLES) - done


def test_building_again_adds_nothing_and_fits_nothing(table, probe, encoder, monkeypatch):
    build("sst2", table, probe, encoder, MANY)
    probe.asked, version = [], table.version
    monkeypatch.setattr(build_module, "fit_task", None)
    report = build("sst2", table, probe, encoder, MANY)
    assert (report.added, report.kept, report.finished.no_fit) == (0, len(MANY), "")
    assert probe.asked == [] and table.version == version


def test_probes_are_fitted_to_the_states_of_all_rows(table, probe, encoder, checkpoint):
    report = build("sst2", table, probe, encoder, MANY)
    assert report.finished.no_fit == "" and "no probes" not in str(report)
    fit, rows = ExitTable.open(table.uri).fit("sst2"), table.rows("sst2")
    assert fit.layers == (1, 2, 3, 4) and set(fit.ids) == set(rows.ids) and len(rows) == len(MANY)
    states = table.states("sst2", fit.ids)
    order = [rows.ids.index(own) for own in fit.ids]
    again = fit_task(
        fit.layers,
        lambda layer: states[layer - 1],
        rows.vectors[order],
        rows.golds[order],
        fit.ids,
        2,
    )
    assert again.digest == fit.digest
    np.testing.assert_array_equal(again.exit_probs, fit.exit_probs)


def test_more_examples_are_fitted_with_those_that_were_there(table, probe, encoder):
    build("sst2", table, probe, encoder, MANY[:40])
    first = table.fit("sst2")
    probe.asked = []
    report = build("sst2", table, probe, encoder, MANY)
    assert (report.added, report.kept) == (len(MANY) - 40, 40)
    assert len(probe.prompts_asked()) == len(MANY) - 40
    second = ExitTable.open(table.uri).fit("sst2")
    assert len(first.ids) == 40 and len(second.ids) == len(MANY)
    assert second.digest != first.digest


def test_fewer_layers_have_probes_where_fewer_are_asked_for(table, probe, encoder):
    build("sst2", table, probe, encoder, MANY, probe_layers=2)
    assert table.metadata.tasks["sst2"].layers == table.fit("sst2").layers == (2, 4)
    assert table.states("sst2", table.fit("sst2").ids).shape[0] == 2
    with pytest.raises(BindingError, match=r"layers \(2, 4\).*layers \(1, 2, 3, 4\)"):
        build("sst2", table, probe, encoder, MANY)


def test_an_unfinished_task_is_served_by_nobody(table, probe, encoder, checkpoint):
    probe.fail_at = BATCHES_PER_COMMIT + 2
    with pytest.raises(KeyboardInterrupt):
        build("sst2", table, probe, encoder, batch_tokens=10)
    assert ExitTable.open(table.uri).count("sst2") > 0
    with pytest.raises(TableError, match="holds no task whose build has finished"):
        ExitRetriever.open(table.uri, backbone=identify_backbone(checkpoint), encoder=encoder)
    probe.fail_at = None
    build("sst2", table, probe, encoder)
    opened = ExitRetriever.open(table.uri, backbone=identify_backbone(checkpoint), encoder=encoder)
    assert opened.heads == {"sst2": "plain"}


def test_states_that_went_are_made_again(table, probe, encoder):
    build("sst2", table, probe, encoder, MANY)
    before = table.fit("sst2")
    states = StateStore(lancedb.connect(table.uri))
    states.forget([table.entry("sst2").shelf], timedelta(0))
    more = [*MANY, Example("fine weather", 1)]
    probe.asked = []
    report = build("sst2", table, probe, encoder, more)
    assert (report.added, table.count("sst2")) == (len(more), len(more))
    assert set(table.fit("sst2").ids) > set(before.ids)


LONG = Task(
    "intents",
    CompletionPrompt("{text}\nIntent:"),
    ("card lost", "card stolen", "card", "transfer money to another account"),
)


def test_labels_are_texts_of_any_length_and_beginning(
    table, probe, encoder, checkpoint, monkeypatch
):
    """The plain head cannot tell three of them apart; probes can."""
    examples = [Example(f"{e.text} {n % 4}", n % 4) for n, e in enumerate(MANY * 2)]
    examples = list(dict.fromkeys(examples))
    build(LONG, table, probe, encoder, examples)
    entry, fit = table.metadata.tasks["intents"], table.fit("intents")
    assert entry.plain_token_ids == () and entry.task.label_texts()[3].startswith(" transfer")
    assert fit.num_labels == 4 and table.rows("intents").plain_probs is None
    monkeypatch.setattr("raee_serve.tasks.registry.TASKS", {})  # nobody looks there
    retriever = ExitRetriever.open(
        table.uri, backbone=identify_backbone(checkpoint), encoder=encoder, max_distance=2.0
    )
    assert dict(retriever.heads) == {"intents": "probe"} and retriever.plain_token_ids == {}
    assert retriever.tasks["intents"].labels == LONG.labels
    texts = [example.text for example in examples[:6]]
    for decision in retriever.decide([Lookup(("intents",), text) for text in texts]):
        assert decision.reason == Reason.RETRIEVED and decision.head == "probe"
        assert decision.probe == f"intents/{decision.exit_layer}"
        assert len(decision.label_scores) == 4
    plain = retriever.decide([Lookup(("intents",), texts[0], head="plain")])[0]
    assert (plain.reason, plain.exit_layer) == (Reason.NO_EVIDENCE, 4)


def test_replacing_swaps_the_rows_when_the_build_is_done(table, probe, encoder):
    build("sst2", table, probe, encoder, EXAMPLES[:6])
    probe.asked, probe.fail_at = [], BATCHES_PER_COMMIT + 2
    with pytest.raises(KeyboardInterrupt):
        build("sst2", table, probe, encoder, batch_tokens=10, replace=True)
    seen = ExitTable.open(table.uri)
    ready = seen.count_unseen()
    assert seen.count_rows() == 6 and 0 < ready < len(EXAMPLES)
    probe.fail_at, probe.asked = None, []
    report = build("sst2", seen, probe, encoder, EXAMPLES[2:], batch_tokens=10, replace=True)
    assert (report.added + report.kept, report.replaced) == (len(EXAMPLES) - 2, 6)
    assert 0 < report.kept <= ready and "in place of 6" in str(report)
    expected = {row_id("sst2", e.text, e.gold) for e in EXAMPLES[2:]}
    assert ExitTable.open(table.uri).row_ids("sst2") == expected and seen.count_unseen() == 0


def test_replacing_swaps_rows_and_probes_at_once(table, probe, encoder):
    build("sst2", table, probe, encoder, MANY)
    version, before = table.version, table.fit("sst2")
    build("sst2", table, probe, encoder, MANY[6:], replace=True)
    after = table.fit("sst2")
    assert set(after.ids) == table.row_ids("sst2") < set(before.ids)
    assert [version.what for version in table.history()][-2:] == [
        f"sst2: {len(MANY) - 6} rows made ready",
        f"sst2: replaced by {len(MANY) - 6} rows",
    ]
    table.rollback(version)
    assert table.fit("sst2").to_bytes() == before.to_bytes()


def test_repeated_examples_become_one_row(table, probe, encoder):
    report = build("sst2", table, probe, encoder, [EXAMPLES[0]] * 3)
    assert report.added == table.count_rows() == 1


def test_long_documents_are_cut_from_their_end(table, probe, encoder, checkpoint):
    long = Example("fine " * 500 + "end", 1)
    report = build("sst2", table, probe, encoder, [long, EXAMPLES[0]], store_text=True)
    assert report.truncated == 1 and "1 prompts truncated" in str(report)
    prompt = max(probe.prompts_asked(), key=len)
    text = AutoTokenizer.from_pretrained(checkpoint).decode(prompt)
    assert probe.max_length - 2 <= len(prompt) <= probe.max_length
    assert text.startswith("fine fine") and text.endswith("fine It was") and "end" not in text
    assert long.text in table.rows("sst2").texts  # the key is the whole text


def test_free_text_rows(table, probe, encoder):
    examples = [
        Example("One. Two. Three.", "It counts."),
        Example("Hello there. " * 99, "A greeting " * 99),
    ]
    report = build("xsum", table, probe, encoder, examples)
    assert report.truncated == 1 and report.finished.no_fit == ""
    rows = table.rows("xsum")
    assert table.metadata.tasks["xsum"].layers == free_text_layers(4) == (2, 3, 4)
    assert rows.golds is None and rows.plain_probs is None and table.fit("xsum") is None
    assert ((rows.reference_hits >= 0) & (rows.reference_hits <= 1)).all()
    assert (rows.agreement[:, -1] == 1).all() and table.metadata.built["xsum"].rows == 2


def test_reference_alone_too_long(table, probe, encoder):
    probe.max_length = 5
    with pytest.raises(TaskError, match="alone exceed the backbone's 5 tokens"):
        build("xsum", table, probe, encoder, [Example("Hello", "one two three four five")])


def test_free_text_layers_end_with_the_last_two():
    assert free_text_layers(30) == (15, 19, 22, 26, 29, 30)
    assert free_text_layers(18) == (9, 11, 14, 16, 17, 18)
    assert free_text_layers(1) == (1,)


def test_batches_keep_to_the_budget_and_hold_every_item_once():
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    items = [Item(str(i), EXAMPLES[0], [0] * n, []) for i, n in enumerate(lengths)]
    batches = list(length_batches(items, 100))
    batched = [item for batch in batches for item in batch]
    assert {item.id for item in batched} == {item.id for item in items}
    assert [item.length for item in batched] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) * batch[0].length <= 100
    assert list(length_batches(items[:1], 1)) == [items[:1]]


def write_data(root):
    folder = root / "sst2"
    folder.mkdir(parents=True)
    rows = [json.dumps({"text": e.text, "label": e.gold}) for e in EXAMPLES]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return root


@pytest.mark.parametrize("family", [tokenized_llama, tokenized_gemma3], ids=["llama", "gemma3"])
def test_command_builds_a_table_that_decides(family, tmp_path, smollm2, capsys):
    model = str(family(tmp_path / "model", smollm2))
    data, uri = str(write_data(tmp_path / "data")), str(tmp_path / "table")
    command = ["build", "--model", model, "--task", "sst2", "--data", data, "--table", uri]
    assert cli.main([*command, "--limit", "8"]) == 0
    assert "sst2: 8 rows added, 0 kept" in capsys.readouterr().out
    # The same seed: the first eight are among the first twelve.
    assert cli.main([*command, "--limit", "12", "--store-text"]) == 0
    assert "sst2: 4 rows added, 8 kept" in capsys.readouterr().out
    assert cli.main(["table", "info", uri]) == 0
    out = capsys.readouterr().out
    assert "sst2: 12 rows" in out and "no probes: it has 12 rows" in out

    retriever = ExitRetriever.open(uri, backbone=identify_backbone(model))
    texts = [text for text in ExitTable.open(uri).rows("sst2").texts if text]
    for decision in retriever.decide([Lookup(("sst2",), text, k=3) for text in texts]):
        assert decision.reason in (Reason.RETRIEVED, Reason.NO_EVIDENCE)
        assert decision.distance < MIN_BOUND


def test_command_replaces_a_task_of_another_template(tmp_path, smollm2, capsys, monkeypatch):
    model = str(tokenized_llama(tmp_path / "model", smollm2))
    data, uri = str(write_data(tmp_path / "data")), str(tmp_path / "table")
    command = ["build", "--model", model, "--task", "sst2", "--data", data, "--table", uri]
    assert cli.main([*command, "--limit", "4"]) == 0
    prompt = CompletionPrompt("{text} All in all it was")
    changed = dataclasses.replace(TASKS["sst2"], prompt=prompt)
    monkeypatch.setitem(TASKS, "sst2", changed)
    assert cli.main([*command, "--limit", "6"]) == 1
    error = capsys.readouterr().err
    assert get_task("sst2").version in error and "build --replace" in error
    assert ExitTable.open(uri).count_rows() == 4
    assert cli.main([*command, "--limit", "6", "--replace"]) == 0
    assert "6 rows added, 0 kept" in capsys.readouterr().out
    table = ExitTable.open(uri)
    assert table.metadata.tasks["sst2"].version == changed.version and table.count_rows() == 6


def test_command_cuts_texts_as_clients_do(tmp_path, smollm2, capsys):
    model = str(tokenized_llama(tmp_path / "model", smollm2))
    data, uri = str(write_data(tmp_path / "data")), str(tmp_path / "table")
    command = ["build", "--model", model, "--task", "sst2", "--data", data, "--table", uri]
    assert cli.main([*command, "--words", "1", "--store-text"]) == 0
    assert {text for text in ExitTable.open(uri).rows("sst2").texts if text} == {"fine", "dull"}
    other = [
        "table",
        "reencode",
        f"{uri}-1",
        "--encoder",
        "minilm",
        "--data",
        data,
        "--out",
        f"{uri}-2",
    ]
    assert cli.main(["build", "--model", model, *command[3:-1], f"{uri}-1", "--words", "1"]) == 0
    assert cli.main(other) == 1
    assert "were they built with another --words?" in capsys.readouterr().err
    assert cli.main([*other, "--words", "1"]) == 0
    assert ExitTable.open(f"{uri}-2").count_rows() == 2


def test_command_refuses_another_backbone(tmp_path, smollm2, capsys):
    first, second = (str(tokenized_llama(tmp_path / str(seed), smollm2, seed)) for seed in (1, 2))
    data, uri = str(write_data(tmp_path / "data")), str(tmp_path / "table")
    options = ["--task", "sst2", "--data", data, "--table", uri, "--limit", "2"]
    assert cli.main(["build", "--model", first, *options]) == 0
    assert cli.main(["build", "--model", second, *options]) == 1
    error = capsys.readouterr().err
    for model in (first, second):
        assert identify_backbone(model).weights[:12] in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "sst3"], "unknown task 'sst3'"),
        (["--task", "sst2", "--limit", "0"], "--limit 0 is not allowed"),
        (["--task", "sst2", "--batch-size", "0"], "--batch-size 0 is not allowed"),
        (["--task", "sst2", "--data", "/nowhere"], "cannot read /nowhere"),
        (["--task", "demo_sentiment", "--model", "/nowhere"], "no model '/nowhere'"),
        (["--task", "demo_sentiment", "--encoder", "/nowhere"], "no model '/nowhere'"),
    ],
)
def test_command_names_what_is_wrong(checkpoint, tmp_path, capsys, options, message):
    uri = tmp_path / "table"
    assert cli.main(["build", "--model", str(checkpoint), "--table", str(uri), *options]) == 1
    assert message in capsys.readouterr().err
    assert not uri.exists()


def test_command_line_without_a_command(capsys):
    for argv in ([], ["build", "--nonsense"], ["table", "sell"], ["train"]):
        with pytest.raises(SystemExit):
            cli.main(argv)
    assert (
        "'table plot', 'table points', 'calibrate', 'serve', 'preview', 'eval'"
        in capsys.readouterr().err
    )
    assert cli.main(["table", "info", "/nowhere"]) == 1
    assert "exit table /nowhere: no such directory" in capsys.readouterr().err
