"""8-bit weights: a few features far larger than the rest do not cost the rest their precision."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from raee_serve.retrieval.onnx_int8 import NUM_EXACT, quantised
from raee_serve.retrieval.onnx_runtime import session

pytestmark = pytest.mark.unit

LONG, SHORT, POSITIONS = 64, 16, 12


@pytest.fixture
def weight():
    return np.random.default_rng(0).normal(size=(LONG, SHORT)).astype(np.float32)


@pytest.fixture
def file(tmp_path, weight):
    """states @ weight"""
    shape = ["batch", "length"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["states", "weight"], ["answer"], "shortening")],
        "model",
        [helper.make_tensor_value_info("states", TensorProto.FLOAT, [*shape, LONG])],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, [*shape, SHORT])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def states(large, seed=1):
    """[1, POSITIONS, LONG], standard normal but for `large` features, a thousand times that."""
    found = np.random.default_rng(seed).normal(size=(1, POSITIONS, LONG)).astype(np.float32)
    found[..., large] *= 1000
    return found


def error(file, weight, example, asked):
    """Largest error of the 8-bit product without what the large features add to it, relative."""
    counts = torch.ones(example.shape[:2], dtype=torch.int64)
    given = {"states": torch.from_numpy(example), "attention_mask": counts}
    answer = session(str(quantised(file, given))).run(None, {"states": asked})[0]
    return np.abs(answer - asked @ weight).max() / np.abs(weight).max()


def test_large_features_are_multiplied_apart(file, weight):
    large = [3, 40, 41]
    assert error(file, weight, states(large), states(large, seed=2)) < 1
    assert error(file, weight, states([]), states(large, seed=2)) > 10  # had they not been seen


def test_what_only_pads_an_example_does_not_count(file, weight):
    """Large features there would take the places of those that texts have."""
    large, padded = [3, 40], list(range(50, 50 + NUM_EXACT))
    example = np.concatenate([states(large), states(padded, seed=3) * 1000], axis=1)
    counts = torch.tensor([[1] * POSITIONS + [0] * POSITIONS])
    given = {"states": torch.from_numpy(example), "attention_mask": counts}
    asked = states(large, seed=2)
    answer = session(str(quantised(file, given))).run(None, {"states": asked})[0]
    assert np.abs(answer - asked @ weight).max() < np.abs(weight).max()
