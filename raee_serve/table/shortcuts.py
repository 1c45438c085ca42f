"""Fits exit shortcuts: ridge regression from the state after a layer to that after the last.

One pass over task text, of which only sums are kept: for each layer the normal equations, in
float64. A share of the documents is held out: it chooses the regularisation, and says what the
maps are worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from raee_serve.errors import RaeeError
from raee_serve.fingerprint import BackboneIdentity
from raee_serve.shortcuts import Shortcut, Shortcuts
from raee_serve.table.probe import LayerProbe
from raee_serve.table.rows import Item, length_batches

DEPTHS = (0.72, 0.83, 0.9, 0.93)
"""Shares of the depth that have shortcuts by default, besides the last layer but one."""
DEFAULT_TOKENS = 100_000
ANSWER_WEIGHT = 4.0
"""How much the state at an answering position counts, one anywhere else counting 1: exits are taken
at such positions alone, but texts have few of them."""
HELD_OUT_EVERY = 4
"""One document of so many is held out, beside the tokens that are fitted on."""
JUDGED_TOKENS = 2048
"""Positions of a task's held-out documents whose states are kept until the end, at most: those that
their references are predicted from, or all where there is none."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Shares of a feature's own sum of squares that its coefficient is penalised with."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Share of `judged` held-out positions of a task at which a head's most probable token is full
    depth's."""

    task: str
    plain: float
    shortcut: float
    judged: int

    def __str__(self) -> str:
        return (
            f"{self.plain:.3f} plain, {self.shortcut:.3f} by shortcut on {self.task} "
            f"({self.judged} held-out tokens)"
        )


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What one map is worth on held-out tokens.

    ridge: the one of `RIDGES` that was chosen; error: mean squared distance from the last layer's
    state over its mean square.
    """

    layer: int
    ridge: float
    error: float
    agreements: tuple[Agreement, ...]

    def __str__(self) -> str:
        return (
            f"layer {self.layer} (ridge {self.ridge:g}, error {self.error:.3f}): agreement with "
            f"full depth {', '.join(map(str, self.agreements))}"
        )


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Where shortcuts are fitted unless told otherwise, ascending; all before the last layer."""
    layers = {round(share * num_layers) for share in DEPTHS} | {num_layers - 1}
    return tuple(sorted(layer for layer in layers if 1 <= layer < num_layers))


def check_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Ascending, each once. Raises RaeeError unless there are some, all before the last layer."""
    if not layers or not all(1 <= layer < num_layers for layer in layers):
        raise RaeeError(
            f"shortcuts at layers {', '.join(map(str, layers)) or 'none'}; allowed: one or more of "
            f"1..{num_layers - 1}, the layers before the backbone's last"
        )
    return tuple(sorted(set(layers)))


def split_documents(items: Iterable[Item], max_tokens: int) -> tuple[list[Item], list[Item]]:
    """(to fit on, held out): of the first items, so that those to fit on have so many tokens.

    Raises RaeeError if that leaves either empty.
    """
    fitted: list[Item] = []
    held_out: list[Item] = []
    total = 0
    for number, item in enumerate(items, 1):
        if number % HELD_OUT_EVERY == 0:
            held_out.append(item)
            continue
        total += item.length
        if total > max_tokens:
            break
        fitted.append(item)
    if not fitted or not held_out:
        raise RaeeError(
            f"{len(fitted) + len(held_out)} documents within {max_tokens} tokens are too few to "
            f"fit shortcuts on: one of {HELD_OUT_EVERY} is held out; give more text or more tokens"
        )
    return fitted, held_out


def fit_shortcuts(
    probe: LayerProbe,
    backbone: BackboneIdentity,
    items: tuple[Sequence[Item], Mapping[str, Sequence[Item]]],
    layers: Sequence[int],
    batch_tokens: int,
    *,
    progress: bool = True,
) -> tuple[Shortcuts, list[LayerReport]]:
    """The maps of `layers`, and what each is worth. items: (to fit on, held out of each task).

    Sums take 16 * hidden^2 bytes a layer.
    """
    fitted, held_out = items
    every_layer = [*layers, probe.num_layers]
    sums = {layer: NormalEquations() for layer in layers}
    every_item = [*fitted, *(item for own in held_out.values() for item in own)]
    total = sum(item.length for item in every_item)
    with tqdm(total=total, desc="shortcuts", unit="token", disable=not progress) as bar:
        for states, answering in passes(probe, fitted, every_layer, batch_tokens, bar):
            weight = torch.where(answering, ANSWER_WEIGHT, 1.0)
            for layer, equations in sums.items():
                equations.add(states[layer], states[probe.num_layers], weight)
        judges = {
            task: Judge(probe, passes(probe, own, every_layer, batch_tokens, bar))
            for task, own in held_out.items()
        }
    maps, reports = {}, []
    for layer, equations in sums.items():
        candidates = {ridge: equations.solved(ridge) for ridge in RIDGES}
        errors = {
            ridge: _mean_error(judges.values(), layer, shortcut)
            for ridge, shortcut in candidates.items()
        }
        ridge = min(RIDGES, key=errors.__getitem__)
        maps[layer] = candidates[ridge]
        agreements = (judge.agreement(task, layer, maps[layer]) for task, judge in judges.items())
        reports.append(LayerReport(layer, ridge, errors[ridge], tuple(agreements)))
    return Shortcuts(backbone, maps), reports


class NormalEquations:
    """Sums for the regression of what the layers after one add to the state on that state.

    Tokens count by one over the square of their last state, as the final norm is going to see
    them: without it the few of enormous norm, such as the first, would be all that is fitted. The
    penalty draws the map towards leaving the state as it is.
    """

    def __init__(self) -> None:
        self._squares: Tensor | None = None  # [hidden + 1, hidden + 1]
        self._products: Tensor | None = None  # [hidden + 1, hidden]

    def add(self, states: Tensor, last: Tensor, weight: Tensor) -> None:
        """[n, hidden] twice: after the layer, and after the last one; weight: [n], of each."""
        states, last = states.double(), last.double()
        size = last.square().mean(dim=1)
        scale = (weight.to(size) / size).sqrt()[:, None]
        inputs = torch.cat([states * scale, scale], dim=1)
        added = (last - states) * scale
        squares, products = inputs.T @ inputs, inputs.T @ added
        if self._squares is None or self._products is None:
            self._squares, self._products = squares, products
        else:
            self._squares += squares
            self._products += products

    def plus(self, other: NormalEquations, weight: float = 1.0) -> NormalEquations:
        """The sums of both, the other's counting so much."""
        assert self._squares is not None and self._products is not None, "nothing was added"
        assert other._squares is not None and other._products is not None, "nothing was added"
        total = NormalEquations()
        total._squares = self._squares + weight * other._squares
        total._products = self._products + weight * other._products
        return total

    def solved(self, ridge: float) -> Shortcut:
        """The map under that penalty, in float32."""
        assert self._squares is not None and self._products is not None, "nothing was added"
        penalty = ridge * self._squares.diagonal()
        penalty[-1] = 0  # the bias is free
        found = torch.linalg.solve(self._squares + penalty.diag(), self._products)
        weight = found[:-1].T + torch.eye(found.shape[1], dtype=found.dtype, device=found.device)
        return Shortcut(weight.float().cpu(), found[-1].float().cpu())


class Judge:
    """What maps are worth at answering positions of a task's held-out documents.

    judged: how many positions those are.
    """

    def __init__(
        self, probe: LayerProbe, passes: Iterable[tuple[dict[int, Tensor], Tensor]]
    ) -> None:
        """passes: all are run, as `passes` gives them."""
        self._probe = probe
        kept: list[dict[int, Tensor]] = []
        for states, answering in passes:
            kept.append({d: at[answering].float().cpu() for d, at in states.items()})
        self._states = {d: torch.cat([at[d] for at in kept])[:JUDGED_TOKENS] for d in kept[0]}
        self._last = self._states[probe.num_layers]
        self._full = probe.top_tokens(self._last)
        self.judged = len(self._last)

    def error(self, layer: int, shortcut: Shortcut) -> float:
        away = (shortcut(self._states[layer]) - self._last).square().mean(dim=1)
        return float((away / self._last.square().mean(dim=1)).mean())

    def agreement(self, task: str, layer: int, shortcut: Shortcut) -> Agreement:
        states = self._states[layer]
        tops = [self._probe.top_tokens(at) for at in (states, shortcut(states))]
        plain, short = (float((top == self._full).float().mean()) for top in tops)
        return Agreement(task, plain, short, self.judged)


def _mean_error(judges: Iterable[Judge], layer: int, shortcut: Shortcut) -> float:
    """Over all positions."""
    errors = [(judge.error(layer, shortcut), judge.judged) for judge in judges]
    return sum(error * n for error, n in errors) / sum(n for _, n in errors)


def passes(
    probe: LayerProbe, items: Sequence[Item], layers: Sequence[int], batch_tokens: int, bar: tqdm
) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
    """Batch by batch: the states by layer, and [positions] which of them answer: those that the
    reference's tokens are predicted from, or in a prompt without one all."""
    for batch in length_batches(items, batch_tokens):
        sequences = [[*item.prompt, *item.reference] for item in batch]
        answers = [_answering(item) for item in batch]
        yield probe.states(sequences, layers), torch.cat(answers)
        bar.update(sum(item.length for item in batch))


def _answering(item: Item) -> Tensor:
    """[length] bool."""
    positions = torch.arange(item.length)
    if not item.reference:
        return positions >= 0
    return (positions >= len(item.prompt) - 1) & (positions < item.length - 1)
