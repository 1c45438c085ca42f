"""What pyproject.toml lists by hand is complete."""

import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
LISTED = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed():
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in (ROOT / "raee_serve").rglob("__init__.py")
    }
    assert set(LISTED["packages"]) == found | {"raee_serve_patches"}


def test_every_data_file_is_listed():
    listed = {
        file
        for package, patterns in LISTED["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    found = (file for file in (ROOT / "raee_serve").rglob("*") if file.is_file())
    assert listed == {file for file in found if file.suffix not in (".py", ".pyc")}
