"""Sessions of ONNX Runtime on the CPU.

The package is imported only when it is needed, by whoever imports this module first: without that
its telemetry keeps a database in the user's cache, for whose lock several processes wait for
minutes, and would call home.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

SLOW_FUSIONS = ["LayerNormFusion", "SkipLayerNormFusion"]
"""Whose fused kernels take longer on a CPU than what they fuse."""


def session(model: str | bytes, threads: int = 1) -> Any:
    """Of a model's file, or of what would be in it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # 1: on the calling thread, wherever that is bound
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
    )
