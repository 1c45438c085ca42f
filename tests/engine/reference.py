"""What a checkpoint cut to its first layers would have said, by Transformers in float32.

The layers are dropped from the loaded model; that a checkpoint cut on disk is the same model is
`tests/unit/test_cut.py`'s business, and saves writing nine of them here.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

TIE = 1e-4
"""Logit distance within which two greedy choices count as equal (invariant 2)."""


@lru_cache(maxsize=1)
def loaded(checkpoint: Path) -> tuple[PreTrainedModel, torch.nn.ModuleList]:
    """The model and all of its layers; the last checkpoint asked for stays in memory."""
    # Eager attention: the others leave Gemma 2's cap on attention scores out.
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model, model.model.layers


def greedy_mismatches(
    checkpoint: Path,
    depth: int,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> list[tuple[int, int, float]]:
    """Places where greedy decoding of the cut checkpoint would have gone another way.

    Each completion is forced on the cut model; since every token must be its greedy choice
    given all before it, none wrong means the whole greedy sequences are equal.
    Returns (prompt index, token index, logit distance to the best) of each wrong token.
    """
    model, layers = loaded(checkpoint)
    model.model.layers = layers[:depth]
    model.config.num_hidden_layers = depth
    wrong = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens = torch.tensor([[*prompt, *completion]])
        with torch.inference_mode():
            kept = len(completion) + 1
            logits = model(tokens, use_cache=False, logits_to_keep=kept).logits[0, :-1]
        chosen = logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
        behind = logits.max(dim=1).values - chosen
        wrong += [(index, i, d) for i, d in enumerate(behind.tolist()) if d > TIE]
    return wrong


def mixed_mismatches(
    checkpoint: Path,
    depths: Sequence[int],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> list[tuple[int, int, int, float]]:
    """`greedy_mismatches` of requests of several depths.

    Returns (depth, request index, token index, logit distance to the best) of each wrong token.
    """
    wrong = []
    for depth in sorted(set(depths)):
        at_depth = [i for i, d in enumerate(depths) if d == depth]
        found = greedy_mismatches(
            checkpoint, depth, [prompts[i] for i in at_depth], [completions[i] for i in at_depth]
        )
        wrong += [(depth, at_depth[i], place, behind) for i, place, behind in found]
    return wrong
