"""What a measurement ran on."""

import os
import platform

import torch
import vllm
from vllm.platforms import current_platform


def machine() -> str:
    """One line: GPU if any, processor, cores this process may use, instruction set, versions."""
    gpu = "" if current_platform.is_cpu() else f"{current_platform.get_device_name()}, "
    return (
        f"{gpu}{_processor()}, {len(os.sched_getaffinity(0))} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, vLLM {vllm.__version__}"
    )


def _processor() -> str:
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
