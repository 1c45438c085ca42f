"""Seam: compile decoder layers one by one, with what vLLM compiles whole stacks with.

Upstream: `VllmBackend.configure_post_pass` and the `inductor_config` it completes; `pass_context`,
`_compilation_context`; `CustomOp.dispatch_forward` and `IrOpPriorityConfig`. That layers share
compiled code rests on `LayerName`, by which the name of an attention layer is an input of it.
Checked on: vLLM 0.32.0.
Why no extension point serves: `support_torch_compile` compiles one function of all layers and drops
all of its guards; the pieces it is split into hold the end of one layer and the beginning of the
next.
Retired by: compilation of layers one by one in vLLM.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import VllmBackend
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.wrapper import _compilation_context
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CompilationMode
from vllm.config.utils import Range
from vllm.model_executor.custom_op import CustomOp
from vllm.platforms import current_platform

from raee_serve.engine.graph_segments import Layer
from raee_serve_patches.seam import Seam

SEAM = Seam(
    "compiled_layers",
    {
        "vllm.compilation.backends:VllmBackend.__init__": "bc240059aec1",
        "vllm.compilation.backends:VllmBackend.configure_post_pass": "c13819d3879a",
        "vllm.compilation.wrapper:_compilation_context": "fba667012de5",
        "vllm.compilation.passes.inductor_pass:pass_context": "419ba44a1fd8",
        "vllm.model_executor.custom_op:CustomOp.dispatch_forward": "191239144c3e",
        "vllm.model_executor.layers.attention.attention:Attention.forward": "6c39e4564720",
        "vllm.utils.torch_utils:LayerName": "a151a742b79b",
        "vllm.config.kernel:IrOpPriorityConfig": "7f75c322f8b5",
    },
)


class CompiledLayers:
    """Layers of a stack as functions, compiled when first called where vLLM compiles the stack.

    Layers of one class and shape share their code; there is one for batches of a single row, and
    one for all others.
    """

    def __init__(self, vllm_config: Any, layers: nn.ModuleList) -> None:
        self._vllm_config = vllm_config
        self._layers = layers

    @contextmanager
    def open(self) -> Iterator[Sequence[Layer]]:
        """While open, the layers may be called for the first time: the largest batch first.

        Afterwards what runs layer by layer has the platform's own kernels: left to the compiler,
        operators are one small kernel after the other where they are not compiled.
        """
        config = self._vllm_config
        if config.compilation_config.mode != CompilationMode.VLLM_COMPILE:
            yield list(self._layers)
            return
        sizes = Range(1, config.scheduler_config.max_num_batched_tokens)
        self._leave_operators_to(compiler=True)
        try:
            with (
                _compilation_context(),
                pass_context(sizes),
                config.kernel_config.ir_op_priority.set_priority(),
            ):
                yield self._functions
        finally:
            self._leave_operators_to(compiler=False)
            _eager_priority(config).set_default()

    @cached_property
    def _functions(self) -> list[Layer]:
        with set_current_vllm_config(self._vllm_config):
            backend = VllmBackend(self._vllm_config)
            backend.configure_post_pass()
        return [
            torch.compile(
                layer.forward, fullgraph=True, dynamic=True, options=backend.inductor_config
            )
            for layer in self._layers
        ]

    def _leave_operators_to(self, *, compiler: bool) -> None:
        """Whether operators that the configuration leaves to the compiler are from now on what it
        compiles, or the platform's own kernels.

        vLLM's own stack stays what it is: it was traced once, before any of this.
        """
        with set_current_vllm_config(self._vllm_config):
            for operator in self._layers.modules():
                if isinstance(operator, CustomOp):
                    operator._enforce_enable = not compiler
                    operator._forward_method = operator.dispatch_forward(compile_native=False)


def _eager_priority(vllm_config: Any) -> Any:
    """As configured, but what is left to the compiler has the platform's choice without one."""
    eager = copy(vllm_config)
    eager.compilation_config = copy(vllm_config.compilation_config)
    eager.compilation_config.mode = CompilationMode.NONE
    without = asdict(current_platform.get_default_ir_op_priority(eager))
    asked = vllm_config.kernel_config.ir_op_priority
    left = [name for name, order in asdict(asked).items() if order[:1] == ["native"]]
    return replace(asked, **{name: without[name] for name in left})
