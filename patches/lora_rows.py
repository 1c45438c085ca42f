"""Seam: keep the row-to-adapter mapping of LoRA layers in step with the rows they are given.

Upstream: `LoRAModelManager.punica_wrapper_mapping`, and of `PunicaWrapperBase` the fields
`_token_lora_indices`, `indices_len` and the method `_update_prefill_metadata`.
Checked on: vLLM 0.32.0, CPU (where the mapping always counts as prefill).
Why no extension point serves: the mapping is set once a step, before the forward, for all rows.
Retired by: LoRA layers that take the mapping of their rows from the forward context.
"""

from typing import Any

import torch

from raee_serve_patches.seam import Seam

_BASE = "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase"
_CPU = "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"
_MIXIN = "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin"

SEAM = Seam(
    "lora_rows",
    {
        "vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping": "fc14134c10e9",
        f"{_BASE}.update_metadata": "d495e482e77f",
        f"{_BASE}._update_prefill_metadata": "8b0a75d78458",
        f"{_CPU}._apply_shrink": "2a7366451840",
        f"{_CPU}._apply_expand": "e28e3a67cdca",
        f"{_MIXIN}._set_active_loras": "9fc864a554db",
    },
)


class LoraRows:
    """The LoRA mapping of one runner's model while a truncated step runs."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._whole: torch.Tensor | None = None
        self._ordered: torch.Tensor | None = None

    def reorder(self, row_order: torch.Tensor | None) -> None:
        """Take the step's mapping, [T] adapter slots by batch row, into plan order."""
        self._whole = self._wrapper.token_lora_indices.clone()
        self._ordered = self._whole if row_order is None else self._whole[row_order]

    def narrow(self, num_rows: int) -> None:
        """Map the first `num_rows` rows; no effect in a step that `reorder` was not called in."""
        if self._ordered is not None:
            self._set(self._ordered[:num_rows])

    def restore(self) -> None:
        """Give the step's own mapping back: vLLM keeps it while the batch stays the same."""
        if self._whole is not None:
            self._set(self._whole)
        self._whole = self._ordered = None

    @property
    def _wrapper(self) -> Any:
        [wrapper] = self._runner.model.lora_manager.punica_wrapper_mapping.values()
        return wrapper

    def _set(self, adapter_slots: torch.Tensor) -> None:
        wrapper = self._wrapper
        wrapper._token_lora_indices[: len(adapter_slots)] = adapter_slots
        wrapper.indices_len[0] = len(adapter_slots)
        wrapper._update_prefill_metadata(adapter_slots)
