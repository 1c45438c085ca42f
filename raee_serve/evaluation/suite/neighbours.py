"""How many neighbours a decision should hear."""

from __future__ import annotations

from functools import partial

from tqdm import tqdm

from raee_serve.evaluation.suite.findings import Findings, Picture, Row
from raee_serve.evaluation.suite.material import Material
from raee_serve.evaluation.suite.scores import averaged, decided, timed

QUESTION = "How do accuracy, depth and the time of a look-up depend on k?"
NEIGHBOURS = (2, 4, 8, 12, 16, 24, 32)
RULES = ("published", "earliest", "fused", "stacked")


def run(material: Material) -> Findings:
    retriever = material.retriever()
    rows: list[Row] = []
    for rule in tqdm(RULES, desc="k", unit="rule"):
        for k in NEIGHBOURS:
            way, ms = timed(partial(decided, material, retriever, rule, k))
            rows.append({"rule": rule, "k": k, **averaged(material, way), "ms": ms})
    return Findings(
        rows,
        Picture("k", "accuracy", "rule", ("low", "high")),
        ["ms: search and aggregation of a prompt, 256 prompts at once, without its embedding."],
    )
