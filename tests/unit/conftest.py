"""Fixtures that several unit tests share."""

import pytest


@pytest.fixture
def uri(tmp_path) -> str:
    """Where an exit table may be made."""
    return str(tmp_path / "table")
