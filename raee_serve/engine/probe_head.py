"""The head `probe`: a linear classifier over a task's labels, in the place of the LM head.

A worker holds several probe sets side by side, so that requests under way keep theirs while a new
table's set comes in. A row that leaves by probe answers in label columns: column `NO_LABEL` stands
for no answer, label j is column `FIRST_LABEL + j`, and all other columns are minus infinity. The
sampler takes these columns for token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.logger import init_logger

from raee_serve.engine.settings import (
    EXIT_HEAD_KEY,
    EXIT_LAYER_KEY,
    FIRST_LABEL,
    NO_LABEL,
    PROBE_BIAS_KEY,
    PROBE_KEY,
    is_exit_layer,
)
from raee_serve.errors import TableError
from raee_serve.exits.probes import Probe, unpacked

logger = init_logger(f"vllm.{__name__}")

COLUMN_STEP = 64
"""Label logits have a multiple of so many columns: vLLM compiles some sampling kernels again for
each width that they meet."""


@dataclass(frozen=True, slots=True)
class AskedProbe:
    """The probe that one request leaves through.

    probe: its set's id and its name; None where the request does not name one properly.
    bias: one float for each label, added to the label's score.
    """

    probe: tuple[str, str] | None
    bias: tuple[float, ...] = ()


def asked_probe(extra_args: Mapping[str, Any] | None, num_layers: int) -> AskedProbe | None:
    """The probe that a request's `extra_args` ask for; None where they ask for another head.

    A request that asks for one in a way nobody can read gets an `AskedProbe` without a name, which
    has no answer. An error would stop the engine, and the LM head's answer would be taken for a
    label's.
    """
    if not extra_args or extra_args.get(EXIT_HEAD_KEY) != "probe":
        return None
    probe, bias = extra_args.get(PROBE_KEY), extra_args.get(PROBE_BIAS_KEY)
    is_readable = (
        is_exit_layer(extra_args.get(EXIT_LAYER_KEY), num_layers)
        and isinstance(probe, list | tuple)
        and [type(part) for part in probe] == [str, str]
        and isinstance(bias, list | tuple)
        and all(isinstance(number, int | float) for number in bias)
    )
    return AskedProbe((probe[0], probe[1]), tuple(bias)) if is_readable else AskedProbe(None)


@dataclass(frozen=True)
class ProbeRows:
    """The rows that `compute_logits` gets in a step in which some requests leave by probe.

    asked: for each row the probe it leaves through; None for a row of the LM head.
    columns: so many columns the sampler reads at least, where all rows leave by probe.
    head_takes_all: the LM head finds a row's adapter by the row's place, so it needs all of them.
    """

    asked: Sequence[AskedProbe | None]
    columns: int = 0
    head_takes_all: bool = False


class HeldProbe(NamedTuple):
    """weight: [num_labels, hidden_size]; bias: [num_labels]. Both float32, on the device."""

    weight: torch.Tensor
    bias: torch.Tensor


class ProbeBank:
    """The probe sets of one worker, and the logits of rows that leave through them."""

    def __init__(self, hidden_size: int, vocab_size: int, device: torch.device) -> None:
        self._hidden_size = hidden_size
        self._vocab_size = vocab_size
        self._device = device
        self._sets: dict[str, dict[str, HeldProbe]] = {}

    def load(self, set_id: str, packed: bytes) -> None:
        """Hold the probes of `packed` as `set_id`, instead of those that were held as it before.

        Raises TableError, and changes nothing, where the bytes or one of the probes is unusable.
        """
        self._sets[set_id] = {name: self._held(name, p) for name, p in unpacked(packed).items()}

    def unload(self, set_id: str) -> None:
        """Forget a set. Requests that ask for it later get no answer."""
        self._sets.pop(set_id, None)

    def logits(
        self,
        hidden_states: torch.Tensor,
        rows: ProbeRows,
        head: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> torch.Tensor | None:
        """The logits of a step in which some rows leave by probe, in float32.

        hidden_states: [rows, hidden_size], after the final norm.
        head: the LM head; [n, hidden_size] -> [n, vocabulary], or None on a tensor parallel rank
            that does not sample. It is called for the other rows alone, if there are any.
        Returns [rows, vocabulary], or fewer columns where all rows leave by probe.
        """
        assert len(hidden_states) == len(rows.asked), (hidden_states.shape, len(rows.asked))
        asked = [probe for probe in rows.asked if probe is not None]
        if len(asked) == len(rows.asked):
            return self.label_logits(hidden_states, asked, rows.columns)

        probed = self._indices([i for i, probe in enumerate(rows.asked) if probe is not None])
        others = self._indices([i for i, probe in enumerate(rows.asked) if probe is None])
        if rows.head_takes_all:
            logits = head(hidden_states)
            of_others = None if logits is None else logits[others]
        else:
            of_others = head(hidden_states[others])
        if of_others is None:
            return None
        labels = self.label_logits(hidden_states[probed], asked)
        logits = torch.empty(
            len(rows.asked), of_others.shape[1], dtype=torch.float32, device=self._device
        )
        logits[others] = of_others.float()
        logits[probed] = -torch.inf
        logits[probed, : labels.shape[1]] = labels
        return logits

    def label_logits(
        self, hidden_states: torch.Tensor, asked: Sequence[AskedProbe], columns: int = 0
    ) -> torch.Tensor:
        """[rows, columns or more] float32: the label columns of rows that all leave by probe.

        A row has no answer where its probe is not held here, its bias is of another length, or its
        scores are not numbers; its only finite column is then `NO_LABEL`.
        """
        held = [self._find(probe) for probe in asked]
        most = max((len(probe.bias) for probe in held if probe is not None), default=0)
        width = self._width(max(FIRST_LABEL + most, columns))
        order = sorted(range(len(asked)), key=lambda row: id(held[row]))
        places = self._indices(order)
        states = hidden_states[places].float()
        bias = np.zeros((len(asked), width - FIRST_LABEL), np.float32)
        labels = torch.full(bias.shape, -torch.inf, device=self._device)
        start = 0
        for _, group in groupby(order, key=lambda row: id(held[row])):
            rows = list(group)
            together, start = slice(start, start + len(rows)), start + len(rows)
            if (probe := held[rows[0]]) is not None:
                its_labels = slice(len(probe.bias))
                scores = torch.addmm(probe.bias, states[together], probe.weight.T)
                labels[together, its_labels] = scores
                bias[together, its_labels] = [asked[row].bias for row in rows]
        labels += self._there(torch.from_numpy(bias))

        answered = labels.logsumexp(dim=1, keepdim=True).isfinite()
        logits = torch.empty(len(asked), width, device=self._device)
        logits[places, NO_LABEL] = torch.where(answered[:, 0], -torch.inf, 0.0)
        logits[places, FIRST_LABEL:] = torch.where(answered, labels, -torch.inf)
        return logits

    def _held(self, name: str, probe: Probe) -> HeldProbe:
        """A probe's tensors on the device. Raises TableError if it does not fit the model."""
        weight, bias = (np.asarray(part, np.float32) for part in (probe.weight, probe.bias))
        if (
            weight.ndim != 2
            or bias.shape != weight.shape[:1]
            or weight.shape[1] != self._hidden_size
        ):
            raise TableError(
                f"probe {name!r} has a weight of shape {weight.shape} and a bias of shape "
                f"{bias.shape}; allowed: [labels, {self._hidden_size}] and [labels]"
            )
        most = self._vocab_size - FIRST_LABEL
        if not 1 <= len(bias) <= most:
            raise TableError(f"probe {name!r} has {len(bias)} labels; allowed: 1..{most}")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise TableError(f"probe {name!r} holds values that are not finite numbers")
        return HeldProbe(*(torch.tensor(part, device=self._device) for part in (weight, bias)))

    def _find(self, asked: AskedProbe) -> HeldProbe | None:
        """The probe as it is held here; None, with a warning, where a request cannot have it."""
        if asked.probe is None:
            logger.warning_once("a request names its probe in a way that cannot be read")
            return None
        set_id, name = asked.probe
        probe = self._sets.get(set_id, {}).get(name)
        if probe is None:
            logger.warning_once("probe %s of set %s is not held here", name, set_id)
        elif len(asked.bias) != len(probe.bias):
            logger.warning_once(
                "a request has %d biases for the %d labels of probe %s of set %s",
                len(asked.bias),
                len(probe.bias),
                name,
                set_id,
            )
            return None
        return probe

    def _width(self, columns: int) -> int:
        return min(-(-columns // COLUMN_STEP) * COLUMN_STEP, self._vocab_size)

    def _indices(self, rows: Sequence[int]) -> torch.Tensor:
        return self._there(torch.tensor(rows))

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, from host memory, on the device; nothing waits for the copy."""
        is_pinned = self._device.type == "cuda"
        return (tensor.pin_memory() if is_pinned else tensor).to(self._device, non_blocking=True)
