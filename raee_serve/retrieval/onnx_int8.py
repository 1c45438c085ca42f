"""Weights of an encoder's ONNX graph in 8 bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raee_serve.retrieval.onnx_runtime import session

NUM_EXACT = 8
"""Features of a long vector that stay in float32 where it is made short."""


def quantised(file: Path, example: dict[str, torch.Tensor]) -> Path:
    """`file` with weights in 8 bits, beside it, and activations scaled as they come.

    example: inputs of the model; "attention_mask" says which of their positions count.

    What is multiplied with the weights that make a long vector short (in a feed-forward block
    after the activation function) has a few features so large that nothing would be left of the
    others in 8 bits. As in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) these few are
    multiplied apart, in float32.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(file)
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    shortening = [n for n in model.graph.node if n.op_type == "MatMul" and _shortens(n, weights)]
    largest = _largest(model, shortening, example)
    exact = [_take_apart(model.graph, n, weights[n.input[1]], largest[n.name]) for n in shortening]
    onnx.save(model, file.with_name("apart.onnx"))
    target = file.with_name("int8.onnx")
    logging.disable(logging.WARNING)  # recommends an optional pass over the graph
    try:
        quantize_dynamic(
            file.with_name("apart.onnx"),
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=exact,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # 7 bits: AVX2 without VNNI saturates sums of products of 8
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.disable(logging.NOTSET)
    return target


def _shortens(node: Any, weights: dict[str, NDArray[Any]]) -> bool:
    weight = weights.get(node.input[1])
    return weight is not None and weight.shape[0] > weight.shape[1]


def _largest(
    model: Any, nodes: list[Any], example: dict[str, torch.Tensor]
) -> dict[str, NDArray[np.float32]]:
    """[features] of what each node multiplies, by its name: the largest size in the example."""
    import onnx

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    inputs = [node.input[0] for node in nodes]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inputs)
    running = session(watched.SerializeToString())
    feeds = {node.name: example[node.name].numpy() for node in running.get_inputs()}
    counts = example["attention_mask"].numpy().astype(bool)
    found = running.run(inputs, feeds)
    return {n.name: np.abs(at[counts]).max(axis=0) for n, at in zip(nodes, found, strict=True)}


def _take_apart(graph: Any, node: Any, weight: NDArray[Any], largest: NDArray[np.float32]) -> str:
    """Multiply the largest features in a node of their own, and add it up; gives its name."""
    import onnx
    from onnx import helper

    features = np.sort(np.argsort(-largest)[:NUM_EXACT])
    others = np.ones_like(largest)
    others[features] = 0
    names = {part: f"{node.name}/{part}" for part in ("others", "features", "weight")}
    parts: dict[str, NDArray[Any]] = {
        "others": others,
        "features": features,
        "weight": weight[features],
    }
    for part, values in parts.items():
        graph.initializer.append(onnx.numpy_helper.from_array(values, names[part]))
    long, short = node.input[0], node.output[0]
    step = {name: f"{node.name}/{name}" for name in ("rest", "most", "few", "exact")}
    place = list(graph.node).index(node)
    node.input[0], node.output[0] = step["rest"], step["most"]
    before = [
        helper.make_node("Mul", [long, names["others"]], [step["rest"]], step["rest"]),
        helper.make_node("Gather", [long, names["features"]], [step["few"]], step["few"], axis=-1),
    ]
    after = [
        helper.make_node("MatMul", [step["few"], names["weight"]], [step["exact"]], step["exact"]),
        helper.make_node("Add", [step["most"], step["exact"]], [short], f"{node.name}/sum"),
    ]
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes[:place], *before, node, *after, *nodes[place + 1 :]])
    return step["exact"]
