"""Exit shortcuts: fitted, stored, read back, and recorded by builds that find them."""

import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from raee_serve import cli
from raee_serve.engine.settings import OFF_VARIABLE, shortcuts_of
from raee_serve.errors import BindingError, RaeeError, TableError
from raee_serve.fingerprint import identify_backbone
from raee_serve.server.launch import _engine_options
from raee_serve.server.settings import DepthSettings
from raee_serve.shortcuts import FILE_NAME, Shortcuts, beside_table, find_shortcuts
from raee_serve.table.build import TaskBuilder
from raee_serve.table.probe import LayerProbe
from raee_serve.table.rows import Item
from raee_serve.table.schema import TableMetadata
from raee_serve.table.shortcuts import (
    ANSWER_WEIGHT,
    HELD_OUT_EVERY,
    check_layers,
    default_layers,
    fit_shortcuts,
    split_documents,
)
from raee_serve.table.shortcuts_command import _items
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import Example, shuffled_examples
from raee_serve.tasks.registry import get_task
from tests.tiny import random_shortcuts, tokenized_gemma3, tokenized_llama

pytestmark = pytest.mark.unit

NUM_LAYERS = 4
DOCUMENTS = [f"Note {n}: the {noun} was {n} miles away." for n, noun in enumerate("abcdefgh" * 3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, smollm2):
    return tokenized_llama(tmp_path_factory.mktemp("llama") / "tiny", smollm2)


@pytest.fixture(scope="module")
def backbone(checkpoint):
    return identify_backbone(checkpoint)


@pytest.fixture(scope="module")
def shortcuts(checkpoint):
    return random_shortcuts(checkpoint, (2, 3))


@pytest.fixture
def probe(checkpoint):
    return LayerProbe(checkpoint, torch.float32)


@pytest.fixture
def table(uri, backbone, encoder):
    return ExitTable.open_or_create(uri, TableMetadata(backbone, encoder.identity()))


def tokens(seed, num_sequences=20, length=40, vocab_size=49152):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (num_sequences, length), generator=draw).tolist()


def items(seed, **sizes):
    """Half of each sequence is its prompt."""
    halves = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in tokens(seed, **sizes)]
    return [Item(str(i), Example("x", "y"), p, r) for i, (p, r) in enumerate(halves)]


def test_the_file_holds_what_was_saved(shortcuts, tmp_path):
    path = tmp_path / "new" / FILE_NAME
    shortcuts.save(path)
    found = Shortcuts.load(path)
    assert (found.backbone, found.layers) == (shortcuts.backbone, (2, 3))
    assert found.digest == shortcuts.digest
    states = torch.randn(3, 32)
    assert torch.equal(found.by_layer[3](states), shortcuts.by_layer[3](states))
    assert [file.name for file in path.parent.iterdir()] == [FILE_NAME]


def test_the_digest_tells_maps_apart(checkpoint, shortcuts):
    assert random_shortcuts(checkpoint, (2, 3), seed=1).digest != shortcuts.digest
    assert random_shortcuts(checkpoint, (1, 3)).digest != shortcuts.digest


def test_a_file_that_is_of_no_use_is_named(checkpoint, shortcuts, tmp_path):
    path = tmp_path / FILE_NAME
    with pytest.raises(TableError, match=re.escape(f"{path} cannot be read")):
        Shortcuts.load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(TableError, match=r"cannot be read.*raee-serve shortcuts fit"):
        Shortcuts.load(path)
    save_file({"2.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(TableError, match="format is None; this version reads 1"):
        Shortcuts.load(path)
    metadata = {"format": "1", "backbone": json.dumps(["no", "backbone"])}
    save_file({"2.weight": torch.zeros(2, 2)}, path, metadata)
    with pytest.raises(TableError, match="cannot be read"):
        Shortcuts.load(path)
    random_shortcuts(checkpoint, (2, NUM_LAYERS)).save(path)
    with pytest.raises(TableError, match=r"layer 4 .* allowed: square ones at layers 1\.\.3"):
        Shortcuts.load(path)


def test_where_they_are_looked_for(tmp_path, shortcuts):
    assert beside_table("s3://bucket/table") is None
    assert find_shortcuts("s3://bucket/table", None) is None
    assert find_shortcuts(str(tmp_path), None) is None
    shortcuts.save(tmp_path / FILE_NAME)
    assert find_shortcuts(str(tmp_path), None) == tmp_path / FILE_NAME
    assert str(find_shortcuts(str(tmp_path), "elsewhere")) == "elsewhere"
    assert find_shortcuts(None, None) is None


def test_layers_are_before_the_last():
    assert default_layers(30) == (22, 25, 27, 28, 29)
    assert default_layers(18) == (13, 15, 16, 17)
    assert default_layers(2) == (1,) and default_layers(1) == ()
    assert check_layers([3, 1, 3], 4) == (1, 3)
    for wrong in ([], [0, 1], [4]):
        with pytest.raises(RaeeError, match=r"allowed: one or more of 1\.\.3"):
            check_layers(wrong, 4)


def test_documents_are_held_out_whole_and_tokens_bounded():
    documents = items(0)
    fitted, held_out = split_documents(iter(documents), 40 * 9)
    assert len(fitted) == 9 and [int(i.id) % HELD_OUT_EVERY for i in held_out] == [3, 3, 3]
    assert not {i.id for i in fitted} & {i.id for i in held_out}
    with pytest.raises(RaeeError, match="too few to fit shortcuts on"):
        split_documents(documents[: HELD_OUT_EVERY - 1], 10_000)
    with pytest.raises(RaeeError, match="2 documents within 100 tokens"):
        split_documents(documents, 100)


def last_layers_linear(model):
    """`model` with its last two layers adding, each, a linear map of the state to it."""

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Linear(32, 32).requires_grad_(False)

        def forward(self, state, *args, **kwargs):
            return state + self.map(state)

    torch.manual_seed(5)
    model.layers[2], model.layers[3] = Linear(), Linear()
    return model.layers[2:]


def test_a_linear_rest_of_the_model_is_found(probe, backbone):
    """Then the map is exact, and agreement with full depth perfect."""
    second, last = last_layers_linear(probe._decoder)
    held_out = {"a": items(2, num_sequences=4), "b": items(3, num_sequences=3)}
    work = (items(1), held_out)
    found, reports = fit_shortcuts(probe, backbone, work, (2, 3), 200, progress=False)
    states = torch.randn(5, 32)
    torch.testing.assert_close(found.by_layer[3](states), last(states), rtol=1e-2, atol=1e-2)
    both = last(second(states))
    torch.testing.assert_close(found.by_layer[2](states), both, rtol=1e-2, atol=1e-2)
    assert [report.layer for report in reports] == [2, 3]
    for report in reports:
        assert [(a.task, a.judged) for a in report.agreements] == [("a", 4 * 20), ("b", 3 * 20)]
        assert all(a.shortcut > 0.95 > a.plain for a in report.agreements)
    assert all(report.error < 1e-3 and report.ridge == 1e-4 for report in reports)


def test_the_fit_is_ridge_regression_drawn_to_the_identity(probe, backbone):
    """By hand, in one go, with the ridge that was chosen."""
    fitted = items(1)
    work = (fitted, {"a": items(2)})
    found, [report] = fit_shortcuts(probe, backbone, work, (2,), 100, progress=False)
    states = probe.states([[*i.prompt, *i.reference] for i in fitted], (2, NUM_LAYERS))
    x, y = states[2].double(), states[NUM_LAYERS].double()
    answering = torch.tensor([[0.0] * 19 + [1] * 20 + [0]] * len(fitted)).reshape(-1, 1)
    counts = 1 + (ANSWER_WEIGHT - 1) * answering
    weight = (counts / y.square().mean(1, keepdim=True)).sqrt()
    inputs, added = torch.cat([x, torch.ones(len(x), 1)], 1) * weight, (y - x) * weight
    penalty = (report.ridge * inputs.square().sum(0)).sqrt().diag()
    penalty[-1] = 0
    rows = torch.cat([inputs, penalty]), torch.cat([added, torch.zeros(33, 32)])
    expected = torch.linalg.lstsq(*rows).solution
    weight = found.by_layer[2].weight
    torch.testing.assert_close(weight, (expected[:-1].T + torch.eye(32)).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.by_layer[2].bias, expected[-1].float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [tokenized_llama, tokenized_gemma3], ids=["llama", "gemma3"])
def test_scores_through_shortcuts_are_those_of_the_cut_model(make, tmp_path, smollm2):
    checkpoint = make(tmp_path / "tiny", smollm2)
    maps = random_shortcuts(checkpoint, (1, 3))
    probe = LayerProbe(checkpoint, torch.float32, maps)
    prompts, references = tokens(3, 3, 9), tokens(4, 3, 5)
    agreement, hits = probe.reference_scores(prompts, references, (2, NUM_LAYERS))
    assert agreement.shape == hits.shape == (3, 4)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    layers = model.model.layers
    for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        full = said(model, layers, prompt + reference, None, NUM_LAYERS)
        for column, layer in ((2, 1), (3, 3)):
            own = said(model, layers, prompt + reference, maps.by_layer[layer], layer)
            right = (own.argmax(-1) == torch.tensor(reference)).float().mean()
            assert hits[row, column] == pytest.approx(float(right))
            same = (own.argmax(-1) == full.argmax(-1)).float().mean()
            assert agreement[row, column] == pytest.approx(float(same))
    assert (agreement[:, 1] == 1).all()


@torch.inference_mode()
def said(model, layers, sequence, shortcut, depth):
    """[5, vocabulary] logits that the last 5 tokens are predicted from."""
    model.model.layers, model.config.num_hidden_layers = layers[:depth], depth
    hook = model.model.norm.register_forward_pre_hook(
        lambda _, args: args if shortcut is None else (shortcut(args[0]),)
    )
    logits = model(torch.tensor([sequence]), use_cache=False).logits[0, -6:-1]
    hook.remove()
    return logits


def build(name, table, probe, encoder, examples, **options):
    return TaskBuilder(get_task(name), table, probe, encoder, **options).build(
        examples, progress=False
    )


def test_a_build_records_both_heads(table, probe, encoder, shortcuts):
    probe.shortcuts = shortcuts
    examples = [Example(text, "It is far.") for text in DOCUMENTS[:3]]
    build("xsum", table, probe, encoder, examples)
    build("sst2", table, probe, encoder, [Example("fine", 1), Example("dull", 0)])
    opened = ExitTable.open(table.uri)
    entry = opened.metadata.tasks["xsum"]
    assert (entry.layers, entry.shortcut_layers) == ((2, 3, 4), (2, 3))
    assert entry.shortcuts == shortcuts.digest and entry.num_exits == 5
    rows = opened.rows("xsum")
    assert rows.agreement.shape == rows.reference_hits.shape == (3, 5)
    assert (rows.agreement[:, 2] == 1).all()
    probe.shortcuts = None
    scores = probe.reference_scores([[5, 6, 7]], [[8, 9]], (2, 3, 4))
    assert [part.shape for part in scores] == [(1, 3)] * 2
    assert opened.metadata.tasks["sst2"].shortcut_layers == ()  # labels are left without


def test_rows_of_other_shortcuts_are_not_added_to(table, probe, encoder, shortcuts, checkpoint):
    examples = [Example(text, "It is far.") for text in DOCUMENTS[:2]]
    build("xsum", table, probe, encoder, examples)
    probe.shortcuts = shortcuts
    with pytest.raises(BindingError, match=r"shortcuts none.*not as .*shortcuts [0-9a-f]{12}"):
        build("xsum", table, probe, encoder, examples)
    build("xsum", table, probe, encoder, examples, replace=True)
    metadata = ExitTable.open(table.uri).metadata
    metadata.check_shortcuts(shortcuts, table.uri)
    for other in (None, random_shortcuts(checkpoint, (2, 3), seed=1)):
        with pytest.raises(BindingError, match=f"through shortcuts {shortcuts.digest} at layers"):
            metadata.check_shortcuts(other, table.uri)


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "data" / "xsum"
    directory.mkdir(parents=True)
    rows = [json.dumps({"document": d, "summary": "It is far."}) for d in DOCUMENTS]
    (directory / "train.jsonl").write_text("\n".join(rows))
    return str(tmp_path / "data")


def test_what_a_build_takes_first_is_fitted_on_last(data, probe):
    """Rows of documents that shortcuts were fitted on say too much good of them."""
    task = get_task("xsum")
    rows = shuffled_examples(task, "train", data, 0)
    taken = [example.text for example in rows]
    fitted = [item.example.text for item in _items(task, rows, probe)]
    assert sorted(taken) == sorted(DOCUMENTS) and fitted == taken[::-1] != taken


def test_fit_then_build_then_refit(checkpoint, data, tmp_path, capsys):
    uri = str(tmp_path / "table")
    common = ["--model", str(checkpoint), "--table", uri, "--data", data, "--dtype", "float32"]
    fit = ["shortcuts", "fit", *common, "--layers", "2", "3"]
    assert cli.main(fit) == 1 and "name tasks with --task" in capsys.readouterr().err
    assert cli.main([*fit, "--task", "xsum"]) == 0
    told = capsys.readouterr().out
    assert re.search(
        r"layer 3 .*: agreement with full depth 0\.\d+ plain, 0\.\d+ by shortcut", told
    )
    first = Shortcuts.load(tmp_path / "table" / FILE_NAME)
    assert cli.main(["build", *common, "--task", "xsum"]) == 0
    assert ExitTable.open(uri).metadata.tasks["xsum"].shortcuts == first.digest
    capsys.readouterr()
    assert cli.main([*fit, "--tokens", "300"]) == 1  # the table's task needs no naming by now
    assert "were probed through the present shortcuts" in capsys.readouterr().err
    assert cli.main([*fit, "--tokens", "300", "--replace"]) == 0
    assert Shortcuts.load(tmp_path / "table" / FILE_NAME).digest != first.digest
    assert cli.main(["build", *common, "--task", "xsum"]) == 1
    assert "build --replace" in capsys.readouterr().err
    assert cli.main(["build", *common, "--task", "xsum", "--replace"]) == 0
    capsys.readouterr()
    assert cli.main(["table", "info", uri]) == 0
    assert "quality kept by the shortcut head at layer  2: " in capsys.readouterr().out
    asked = ["preview", "--table", uri, "--model", str(checkpoint), "--task", "xsum"]
    asked += ["--prompt", DOCUMENTS[0]]
    assert cli.main([*asked, "--budget", "0.5"]) == 0
    told = capsys.readouterr()
    assert "expected by layer, shortcut head:" in told.out
    assert re.search(r"shortcuts [0-9a-f]{12} at layers 2, 3", told.err)
    assert cli.main([*fit, "--replace", "--tokens", "250"]) == 0
    assert cli.main(asked) == 1
    assert "were probed through shortcuts" in capsys.readouterr().err


def test_a_server_hands_them_to_the_engine(tmp_path, shortcuts, monkeypatch):
    monkeypatch.delenv(OFF_VARIABLE, raising=False)
    args = Namespace(kv_segments="auto")
    beside = DepthSettings(table=str(tmp_path))
    assert "additional_config" not in _engine_options(args, beside)
    shortcuts.save(tmp_path / FILE_NAME)
    given = DepthSettings(exit_layer="full", shortcuts_file=str(tmp_path / FILE_NAME))
    for settings in (beside, given):
        config = _engine_options(args, settings)["additional_config"]
        assert shortcuts_of(config).digest == shortcuts.digest
    monkeypatch.setenv(OFF_VARIABLE, "1")
    assert "additional_config" not in _engine_options(args, beside)


def test_build_fits_them_where_there_are_none(checkpoint, data, tmp_path, capsys):
    uri = str(tmp_path / "table")
    build = ["build", "--model", str(checkpoint), "--table", uri, "--data", data]
    build += ["--dtype", "float32", "--task", "xsum", "--shortcuts"]
    assert cli.main(build) == 0
    digest = Shortcuts.load(tmp_path / "table" / FILE_NAME).digest
    entry = ExitTable.open(uri).metadata.tasks["xsum"]
    assert entry.shortcuts == digest and entry.shortcut_layers == default_layers(NUM_LAYERS)
    capsys.readouterr()
    assert cli.main(build) == 0  # repeated, it goes on with what is there
    assert "fitted" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--table", "s3://bucket/table", "--task", "xsum"], "give --shortcuts-file FILE"),
        (["--table", "t", "--task", "xsum", "--layers", "4"], "allowed: one or more of 1..3"),
        (["--table", "t", "--task", "none"], "unknown task 'none'"),
    ],
)
def test_a_fit_that_cannot_be_is_refused_early(
    arguments, told, checkpoint, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LayerProbe, "__init__", lambda *_: pytest.fail("loaded the backbone"))
    assert cli.main(["shortcuts", "fit", "--model", str(checkpoint), "--data", data, *arguments])
    assert told in capsys.readouterr().err


def test_another_backbones_are_refused_by_a_build(data, tmp_path, smollm2, checkpoint, capsys):
    other = tokenized_llama(tmp_path / "other", smollm2, seed=1)
    uri = tmp_path / "table"
    random_shortcuts(other, (2,)).save(uri / FILE_NAME)
    common = ["--table", str(uri), "--data", data, "--task", "xsum", "--limit", "2"]
    assert cli.main(["build", "--model", str(checkpoint), *common]) == 1
    assert "were fitted for backbone LlamaForCausalLM" in capsys.readouterr().err


def test_agreement_does_not_depend_on_the_batch(probe, shortcuts):
    probe.shortcuts = shortcuts
    prompts, references = tokens(6, 4, 12), tokens(7, 4, 6)
    together, *_ = probe.reference_scores(prompts, references, (2, NUM_LAYERS))
    alone = [
        probe.reference_scores([p], [r], (2, NUM_LAYERS))[0]
        for p, r in zip(prompts, references, strict=True)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-3)
