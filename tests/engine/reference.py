"""What a checkpoint cut to its first layers would have said, by Transformers in float32.

The layers are dropped from the loaded model; that a checkpoint cut on disk is the same model is
`tests/unit/test_cut.py`'s business, and saves writing nine of them here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from raee_serve import vector_math
from raee_serve.shortcuts import Shortcut

TIE = 1e-4
"""Logit distance within which two greedy choices count as equal (invariant 2)."""


@lru_cache(maxsize=1)
def loaded(checkpoint: Path) -> tuple[PreTrainedModel, torch.nn.ModuleList]:
    """The model and all of its layers; the last checkpoint asked for stays in memory."""
    vector_math.settle()
    # Eager attention: the others leave Gemma 2's cap on attention scores out.
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model, model.model.layers


def cut(checkpoint: Path, depth: int) -> PreTrainedModel:
    """The model with its first `depth` layers alone, until it is cut again."""
    model, layers = loaded(checkpoint)
    model.model.layers = layers[:depth]
    model.config.num_hidden_layers = depth
    return model


def last_states(
    checkpoint: Path, depth: int, prompts: Sequence[Sequence[int]]
) -> Iterator[torch.Tensor]:
    """Of each prompt, the state [hidden_size] at its last position: of the model cut to `depth`
    layers, after the final norm.
    """
    model = cut(checkpoint, depth)
    for prompt in prompts:
        with torch.inference_mode():
            yield model.model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -1]


def greedy_mismatches(
    checkpoint: Path,
    depth: int,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    shortcut: Shortcut | None = None,
) -> list[tuple[int, int, float]]:
    """Places where greedy decoding of the cut checkpoint would have gone another way.

    shortcut: stands between the last of its layers and the final norm.

    Each completion is forced on the cut model; since every token must be its greedy choice
    given all before it, none wrong means the whole greedy sequences are equal.
    Returns (prompt index, token index, logit distance to the best) of each wrong token.
    """
    model = cut(checkpoint, depth)
    wrong = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens = torch.tensor([[*prompt, *completion]])
        with torch.inference_mode(), before_norm(model, shortcut):
            kept = len(completion) + 1
            logits = model(tokens, use_cache=False, logits_to_keep=kept).logits[0, :-1]
        chosen = logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
        behind = logits.max(dim=1).values - chosen
        wrong += [(index, i, d) for i, d in enumerate(behind.tolist()) if d > TIE]
    return wrong


@contextmanager
def before_norm(model: PreTrainedModel, shortcut: Shortcut | None) -> Iterator[None]:
    """While open, the final norm is given what `shortcut` makes of the state."""
    if shortcut is None:
        yield
        return
    hook = model.model.norm.register_forward_pre_hook(
        lambda _, args: (args[0] @ shortcut.weight.T + shortcut.bias,)
    )
    try:
        yield
    finally:
        hook.remove()


def mixed_mismatches(
    checkpoint: Path,
    depths: Sequence[int],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    shortcuts: Mapping[int, Shortcut] | None = None,
) -> list[tuple[int, int, int, float]]:
    """`greedy_mismatches` of requests of several depths.

    shortcuts: by request index, of those that leave through one.
    Returns (depth, request index, token index, logit distance to the best) of each wrong token.
    """
    exits = [(depth, (shortcuts or {}).get(i)) for i, depth in enumerate(depths)]
    wrong = []
    for depth, is_short in sorted({(depth, s is not None) for depth, s in exits}):
        there = [i for i, (d, s) in enumerate(exits) if (d, s is not None) == (depth, is_short)]
        shortcut = exits[there[0]][1]
        chosen = [prompts[i] for i in there], [completions[i] for i in there]
        found = greedy_mismatches(checkpoint, depth, *chosen, shortcut)
        wrong += [(depth, there[i], place, behind) for i, place, behind in found]
    return wrong
