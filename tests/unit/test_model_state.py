"""What model runner V2's state plans for a step, on CPU tensors."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from raee_serve.engine import model_state
from raee_serve.engine.model_state import TruncatingModelState
from raee_serve.engine.models.truncated import TruncatedExecution
from raee_serve.engine.probe_head import AskedProbe, ProbeRows
from raee_serve.engine.scheduler import Exits
from raee_serve.engine.settings import CPU_WORKER_CLS, GPU_WORKER_CLS, exit_args, probe_args

pytestmark = pytest.mark.unit

NUM_LAYERS = 6


@pytest.fixture
def state(monkeypatch):
    """One that follows exits, at shortcuts after layer 3; vLLM's part of it does nothing."""
    vllms = SimpleNamespace(
        add_request=lambda self, *args: None,
        remove_request=lambda self, *args: None,
        initialize_kv_cache=lambda self, *args: None,
        prepare_attn=lambda self, *args, **kwargs: {"vllm": "metadata"},
    )
    for name, does in vars(vllms).items():
        monkeypatch.setattr(DefaultModelState, name, does)
    monkeypatch.setattr(model_state, "async_tensor_h2d", lambda t, device: torch.as_tensor(t))
    state = object.__new__(TruncatingModelState)
    state.device = torch.device("cpu")
    model = SimpleNamespace(get_vocab_size=lambda: 1000, logits_processors=None)
    state.vllm_config = SimpleNamespace(model_config=model)
    state.follow(None, Exits(NUM_LAYERS, frozenset({3})), (2, 4, 6))
    return state


def add(state, request_id, exit_layer=None, head="plain", extra_args=None, **sampling):
    if exit_layer is not None:
        extra_args = exit_args(exit_layer, head)
    params = SamplingParams(**sampling, extra_args=extra_args)
    state.add_request(0, SimpleNamespace(req_id=request_id, sampling_params=params))


def prepared(state, request_ids, lens=None, drafts=None, mode=CUDAGraphMode.NONE):
    """What `prepare_attn` gives for a step of these requests."""
    lens = np.array(lens or [1] * len(request_ids), dtype=np.int32)
    batch = SimpleNamespace(
        req_ids=list(request_ids),
        num_reqs=len(request_ids),
        num_tokens=int(lens.sum()),
        num_scheduled_tokens=lens,
        num_draft_tokens_per_req=None if drafts is None else np.array(drafts, dtype=np.int32),
        input_ids=torch.arange(lens.sum(), dtype=torch.int32),
        positions=torch.arange(lens.sum()),
        seq_lens=torch.from_numpy(lens),
        seq_lens_cpu_upper_bound=torch.from_numpy(lens),
    )
    tables = (torch.zeros(len(request_ids), 2, dtype=torch.int32),)
    slots = torch.arange(lens.sum())[None]
    return state.prepare_attn(batch, mode, tables, slots, [], None)


def test_full_depth_and_unknown_requests_take_vllms_path(state):
    add(state, "a")
    assert prepared(state, ["a", "dummy"], mode=CUDAGraphMode.FULL) == {"vllm": "metadata"}
    assert state.replayed() is None and state.enter_forward() is None


def test_one_depth_runs_on_vllms_metadata(state):
    add(state, "a", 2)
    add(state, "b", 2)
    assert prepared(state, ["a", "b"]) == {"vllm": "metadata"}
    assert state.enter_forward().is_plain
    assert state.enter_forward() is None, "a plan is of one forward"


def test_mixed_depths_get_metadata_at_their_stages(state):
    add(state, "a", 2)
    add(state, "b", 5)
    assert prepared(state, ["a", "b"]) == {}
    plan = state.enter_forward()
    assert plan.request_order.tolist() == [1, 0]
    assert [stage.end_layer for stage in plan.stages] == [2, 5]


@pytest.mark.parametrize(
    ("sampling", "drafts", "kept"),
    [
        ({}, None, [3]),
        ({}, [2], [1, 2, 3]),
        ({"prompt_logprobs": 1}, None, None),
    ],
    ids=["sampled", "drafts", "scored"],
)
def test_rows_that_are_read_are_kept(state, sampling, drafts, kept):
    add(state, "a", 3, **sampling)
    prepared(state, ["a"], lens=[4], drafts=drafts)
    rows = state.enter_forward().stages[-1].kept_rows
    assert (None if rows is None else rows.tolist()) == kept


def test_a_request_that_is_gone_is_forgotten(state):
    add(state, "a", 2)
    state.remove_request("a")
    assert prepared(state, ["a"]) == {"vllm": "metadata"}
    assert state.enter_forward() is None
    state.remove_request("never there")


def test_a_graph_of_all_layers_is_never_run_truncated(state):
    add(state, "a", 2)
    with pytest.raises(AssertionError, match="graph of all layers"):
        prepared(state, ["a"], mode=CUDAGraphMode.FULL)


PROBE = AskedProbe(("set", "name"), (0.0, 1.0))


def add_by_probe(state, request_id, exit_layer, **sampling):
    add(state, request_id, extra_args=probe_args(exit_layer, "set", "name", PROBE.bias), **sampling)


def test_rows_by_probe_are_those_of_one_call(state):
    add(state, "a", 2)
    add_by_probe(state, "b", 3, logprobs=2)
    add_by_probe(state, "c", NUM_LAYERS)
    add(state, "d")
    prepared(state, "abcd", lens=[3, 4, 5, 2], drafts=[2, 0, 0, 1])
    rows = state.probe_rows()
    assert rows == ProbeRows([None, None, None, PROBE, PROBE, None, None], columns=2)
    assert state.probe_rows() is None, "prompts are scored by the LM head"
    prepared(state, ["a", "dummy"])
    assert state.probe_rows() is None


def test_a_graph_of_all_layers_can_end_in_probes(state):
    add_by_probe(state, "a", NUM_LAYERS)
    assert prepared(state, ["a"], mode=CUDAGraphMode.FULL) == {"vllm": "metadata"}
    assert state.enter_forward() is None
    assert state.probe_rows() == ProbeRows([PROBE])


def test_rows_of_a_step_that_never_sampled_are_forgotten(state):
    add_by_probe(state, "a", 2)
    prepared(state, ["a"])
    prepared(state, ["dummy"])
    assert state.probe_rows() is None


class Graphs:
    sizes = (1, 4)

    def run(self, rows, layout, order, alive):
        return order.tolist(), alive.tolist(), layout.sizes, rows.max_seq_len


def test_decodes_at_exit_points_are_replayed(state):
    state._graphs = Graphs()
    for name, layer in (("a", 2), ("b", 6), ("c", 2)):
        add(state, name, layer)
    assert prepared(state, ["a", "b", "c"]) == {}
    assert state.replayed() == ([1, 0, 2], [3, 1, 1], (4, 1, 1), 1)
    assert state.replayed() is None
    assert state.enter_forward() is None


@pytest.mark.parametrize(
    ("exit_layer", "head", "lens"),
    [(3, "plain", [1]), (3, "shortcut", [1]), (2, "plain", [2])],
    ids=["no exit point", "shortcut", "prefill"],
)
def test_other_steps_are_not(state, exit_layer, head, lens):
    state._graphs = Graphs()
    add(state, "a", exit_layer, head)
    prepared(state, ["a"], lens=lens)
    assert state.replayed() is None
    assert state.enter_forward() is not None


@pytest.mark.parametrize(
    ("mode", "prompt_embeds", "captured"),
    [
        (CUDAGraphMode.FULL_AND_PIECEWISE, None, [(1, 2, 4)]),
        (CUDAGraphMode.FULL_DECODE_ONLY, None, [(1, 2, 4)]),
        (CUDAGraphMode.PIECEWISE, None, []),
        (CUDAGraphMode.FULL_AND_PIECEWISE, "embeds", []),
    ],
    ids=["default", "decode", "piecewise", "embeds"],
)
def test_segments_are_captured_beside_whole_graphs(
    state, monkeypatch, mode, prompt_embeds, captured
):
    config = SimpleNamespace(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 2, 4, 8])
    state.vllm_config = SimpleNamespace(compilation_config=config)
    state.prompt_embeds_state, state.max_num_reqs = prompt_embeds, 4
    state._decoder = SimpleNamespace(layers=None)
    state._layers = SimpleNamespace(open=lambda: nullcontext([]))
    monkeypatch.setattr(model_state, "capturing", lambda _: nullcontext())
    sizes = []
    monkeypatch.setattr(state, "segment_graphs", lambda *args: sizes.append(args[0]))
    state.capture_inner_cudagraphs(None, None, None, None)
    assert sizes == captured


def test_graphs_are_of_one_kv_cache(state):
    state._graphs = Graphs()
    state.initialize_kv_cache(None, None)
    assert state._graphs is None


def test_it_is_vllms_until_it_follows():
    state = object.__new__(TruncatingModelState)
    assert state._asked_in(SimpleNamespace(req_ids=["a"])) == []


@pytest.mark.parametrize(
    ("worker", "is_ours"), [(CPU_WORKER_CLS, True), (GPU_WORKER_CLS, True), ("auto", False)]
)
def test_vllm_chooses_for_models_without_a_worker_of_ours(worker, is_ours):
    class Model(TruncatedExecution, nn.Module):
        pass

    config = VllmConfig()
    config.parallel_config.worker_cls = worker
    assert not hasattr(Model(), "get_model_state_cls")
    with set_current_vllm_config(config):
        assert hasattr(Model(), "get_model_state_cls") is is_ours
        if is_ours:
            assert Model().get_model_state_cls() is TruncatingModelState
