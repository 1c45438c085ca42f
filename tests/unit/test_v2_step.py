"""How a truncated step gets past model runner V2's own graphs, and to its attention metadata."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core.sched.output import SchedulerOutput

from raee_serve.engine.plan import plan_truncation
from raee_serve.engine.scheduler import Exits
from raee_serve_patches import v2_step
from raee_serve_patches.v2_step import StageAttention, V2Step

pytestmark = pytest.mark.unit

NUM_LAYERS = 6
DECODER = object()


@pytest.fixture
def runner():
    followed = []
    state = SimpleNamespace(follow=lambda *what: followed.append(what))
    manager = SimpleNamespace(_graphs_captured=True)
    return SimpleNamespace(model_state=state, cudagraph_manager=manager, followed=followed)


def step_of(runner):
    return V2Step(runner, DECODER, Exits(NUM_LAYERS), (6,))


@pytest.mark.parametrize(
    ("exit_layers", "is_hidden"), [([6, 6], False), ([6, 2], True), ([], False)]
)
def test_whole_graphs_are_hidden_from_truncated_steps(runner, exit_layers, is_hidden):
    step = step_of(runner)
    output = SimpleNamespace(exit_layers=dict(enumerate(exit_layers)))
    with step.running(output):
        assert runner.cudagraph_manager._graphs_captured is not is_hidden
    assert runner.cudagraph_manager._graphs_captured
    with pytest.raises(RuntimeError, match="device"), step.running(output):
        raise RuntimeError("the device failed")
    assert runner.cudagraph_manager._graphs_captured


@pytest.mark.parametrize("manager", [None, SimpleNamespace(_graphs_captured=False)])
def test_there_may_be_no_graphs(runner, manager):
    runner.cudagraph_manager = manager
    with step_of(runner).running(SimpleNamespace(exit_layers={"a": 2})):
        assert manager is None or not manager._graphs_captured
    assert manager is None or not manager._graphs_captured


def test_a_step_that_no_scheduler_planned_is_of_full_depth(runner):
    """vLLM warms its kernels up with such steps."""
    with step_of(runner).running(SchedulerOutput.make_empty()):
        assert runner.cudagraph_manager._graphs_captured


def test_the_state_is_told_and_asked(runner):
    assert step_of(runner).source is runner.model_state
    assert runner.followed == [(DECODER, Exits(NUM_LAYERS), (6,))]


def test_another_model_state_is_named(runner):
    runner.model_state, runner.get_model = object(), lambda: SimpleNamespace()
    with pytest.raises(RuntimeError, match="text models truncated"):
        step_of(runner)


def test_each_stage_gets_the_rows_alive_in_it(monkeypatch):
    """Requests of 1, 3 and 2 rows at exit layers 2, 6 and 4; layers in two KV cache groups."""
    context = SimpleNamespace()
    monkeypatch.setattr(v2_step, "get_forward_context", lambda: context)
    monkeypatch.setattr(v2_step, "async_tensor_h2d", lambda t, device: t)
    plan = plan_truncation([2, 6, 4], [1, 3, 2], NUM_LAYERS)
    batch = SimpleNamespace(
        num_reqs=3,
        seq_lens=torch.tensor([11, 13, 12, 0]),
        seq_lens_cpu_upper_bound=torch.tensor([11, 15, 12, 0]),
    )
    tables = [torch.tensor([[1], [3], [2], [0]]) * scale for scale in (1, 10)]
    slots = torch.stack([torch.arange(8), 10 * torch.arange(8)])  # two rows pad the batch
    groups = [
        SimpleNamespace(
            layer_names=[f"layers.{i}.attn" for i in range(NUM_LAYERS) if i % 2 == group],
            kv_cache_group_id=group,
            build_metadata=lambda common, _: common,
        )
        for group in (0, 1)
    ]
    attention = StageAttention(plan, batch, tables, slots, [[groups[0]], [groups[1]]])
    alive = {
        2: ([13, 12, 11], [1, 2, 3, 4, 5, 0]),
        4: ([13, 12], [1, 2, 3, 4, 5]),
        6: ([13], [1, 2, 3]),
    }
    for stage in plan.stages:
        attention.enter(stage)
        seq_lens, rows = alive[stage.end_layer]
        layers = range(stage.first_layer, stage.end_layer)
        assert list(context.slot_mapping) == list(context.attn_metadata)
        assert set(context.attn_metadata) == {f"layers.{i}.attn" for i in layers}
        for layer in layers:
            scale = 10 if layer % 2 else 1
            built = context.attn_metadata[f"layers.{layer}.attn"]
            assert built.seq_lens.tolist() == seq_lens
            assert built.max_seq_len == 15
            assert built.block_table_tensor[:, 0].tolist() == [scale * (n - 10) for n in seq_lens]
            assert built.slot_mapping.tolist() == [scale * row for row in rows]
            assert context.slot_mapping[f"layers.{layer}.attn"] is built.slot_mapping
            assert built.num_actual_tokens == len(rows)
