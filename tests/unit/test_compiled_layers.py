"""What compiles layers one by one, and what their operators run beside it."""

import pytest
from torch import nn
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.config.compilation import CompilationMode
from vllm.model_executor.custom_op import CustomOp

from raee_serve_patches.compiled_layers import CompiledLayers

pytestmark = pytest.mark.unit


@CustomOp.register("raee_test_operator")
class Operator(CustomOp):
    def forward_native(self):
        return "for the compiler"

    def forward_cpu(self):
        return "the platform's"


@pytest.fixture
def config():
    return VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))


@pytest.fixture
def layers(config):
    with set_current_vllm_config(config):
        return nn.ModuleList([nn.Sequential(Operator()), nn.Linear(2, 2)])


def test_operators_are_the_compilers_while_layers_are_compiled(config, layers):
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    [operator] = layers[0]
    compiled = CompiledLayers(config, layers)
    for _ in range(2):  # graphs are captured twice, to see how much memory they take
        with compiled.open() as functions:
            assert operator() == "for the compiler"
        assert len(functions) == len(layers)
        assert functions[0] is not layers[0]
        assert operator() == "the platform's"


def test_layers_are_themselves_where_vllm_does_not_compile(config, layers):
    config.compilation_config.mode = CompilationMode.NONE
    with CompiledLayers(config, layers).open() as functions:
        assert functions == list(layers)
    [operator] = layers[0]
    assert operator() == "for the compiler", "as it was asked for"
