"""Fixtures that every group of tests shares."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from raee_serve.checkpoints import resolve_backbone, resolve_encoder

REPOSITORY = Path(__file__).parent.parent

settings.register_profile("shared machine", deadline=None)  # no test is judged by its time
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, converted from its package."""
    return Path(resolve_backbone("smollm2-135m"))


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M, converted from its package."""
    return Path(resolve_backbone("gemma3-270m"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 from its package."""
    return Path(resolve_encoder("minilm"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The real data sets; tests that need them are skipped where they are not."""
    root = Path(os.environ.get("RAEE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no data sets at {root} (set RAEE_DATA)")
    return root
