"""An attached model runs plans however it is called, and is vLLM's own until then."""

import pytest
import torch
from torch import nn

from raee_serve.engine.models.truncated import TruncatedExecution
from raee_serve.engine.plan import plan_truncation

pytestmark = pytest.mark.unit

NUM_LAYERS = 4


class Stack(nn.Module):
    """A decoder stack whose layers each add one; its own forward always runs all of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(AddOne() for _ in range(NUM_LAYERS))

    def embed_input_ids(self, input_ids):
        return torch.zeros(len(input_ids), 1)

    def norm(self, hidden, residual):
        return hidden + residual, None

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        hidden, residual = self.embed_input_ids(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden, residual)[0]


class AddOne(nn.Module):
    def forward(self, positions, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        return torch.ones_like(hidden), residual


class TextModel(TruncatedExecution, nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Stack()

    def forward(self, input_ids, positions):
        return self.model(input_ids, positions)


class Multimodal(nn.Module):
    """Goes past the text model's forward, as vLLM's multimodal Gemma 3 does."""

    def __init__(self, text_model):
        super().__init__()
        self.language_model = text_model

    def forward(self, input_ids, positions):
        return self.language_model.model(input_ids, positions)


class Source:
    def __init__(self, exit_layers):
        self.exit_layers = exit_layers

    def enter_forward(self):
        return plan_truncation(self.exit_layers, [1] * len(self.exit_layers), NUM_LAYERS)

    def enter_stage(self, stage):
        pass

    def replayed(self):
        return None

    def width(self, num_rows):
        return num_rows


@pytest.mark.parametrize("around", [lambda text: text, Multimodal], ids=["text", "multimodal"])
def test_rows_run_their_own_depth_once_attached(around):
    text_model = TextModel()
    model = around(text_model)
    ids = torch.zeros(3, dtype=torch.long)
    assert model(ids, ids)[:, 0].tolist() == [NUM_LAYERS] * 3

    text_model.attach(Source([2, 4, 1]))
    assert model(ids, ids)[:, 0].tolist() == [2, 4, 1]


def test_full_depth_takes_the_models_own_forward():
    text_model = TextModel()
    calls = []
    own = text_model.model.forward
    text_model.model.forward = lambda *args: calls.append(1) or own(*args)
    text_model.attach(Source([NUM_LAYERS] * 2))
    ids = torch.zeros(2, dtype=torch.long)
    assert text_model(ids, ids)[:, 0].tolist() == [NUM_LAYERS] * 2
    assert calls == [1]
