"""Seeded requests whose prompt is cut draw nothing until it is complete."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raee_serve_patches.seeded_chunks import undrawn_while_incomplete

pytestmark = pytest.mark.unit


def seeded():
    return torch.Generator().manual_seed(7)


def test_what_the_seam_is_for_a_cpu_generator_has_no_offset_to_take_back():
    with pytest.raises(RuntimeError, match="does not use offset"):
        seeded().get_offset()


def test_only_rows_that_are_sampled_have_their_generator():
    generators = {0: seeded(), 2: seeded(), 3: seeded()}
    before = dict(generators)
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(generators=generators),
        discard_request_mask=SimpleNamespace(np=np.array([True, True, False, True, True])),
    )
    with undrawn_while_incomplete(runner):
        assert set(generators) == {2}
        torch.rand(1, generator=generators[2])
    assert generators == before
    assert torch.equal(generators[0].get_state(), seeded().get_state())
    assert not torch.equal(generators[2].get_state(), seeded().get_state())
