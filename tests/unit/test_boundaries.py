"""Which part may import what, read from the source (docs/architecture.md)."""

import ast
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).parents[2] / "raee_serve"
MODULES = sorted(PACKAGE.rglob("*.py"))


@cache
def imports(file: Path) -> set[str]:
    """Full names of all modules a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(name: str) -> set[str]:
    return {
        file.relative_to(PACKAGE).as_posix()
        for file in MODULES
        if any(module == name or module.startswith(f"{name}.") for module in imports(file))
    }


def inside(*parts: str) -> set[str]:
    return {
        file.relative_to(PACKAGE).as_posix()
        for file in MODULES
        if file.relative_to(PACKAGE).parts[0] in parts
    }


def test_the_parts_exist():
    for part in ("exits", "tasks", "table", "retrieval", "engine", "server", "evaluation"):
        assert inside(part), f"no modules in {part}"


def test_lancedb_is_the_stores_and_its_indexs_alone():
    assert importers("lancedb") == {"table/store.py", "table/index.py"}


def test_sentence_transformers_is_the_encoders_alone():
    assert importers("sentence_transformers") == {
        "retrieval/encoder.py",
        "retrieval/cut_encoder.py",
    }


@pytest.mark.parametrize("name", ["vllm", "raee_serve_patches"])
def test_table_and_retrieval_do_not_know_vllm(name):
    assert not importers(name) & inside(
        "exits", "tasks", "table", "retrieval", "records.py", "errors.py"
    )


@pytest.mark.parametrize("part", ["engine", "server", "evaluation"])
def test_table_and_retrieval_do_not_know_what_uses_them(part):
    assert not importers(f"raee_serve.{part}") & inside("table", "retrieval")


@pytest.mark.parametrize("name", ["raee_serve.table", "raee_serve.retrieval", "raee_serve.server"])
def test_engine_knows_nothing_but_exits(name):
    assert not importers(name) & inside("engine")


def test_the_method_knows_no_model_and_no_table():
    allowed = {"__future__", "collections", "dataclasses", "functools", "hashlib", "typing"}
    allowed |= {"numpy", "raee_serve", "safetensors", "scipy", "sklearn", "threadpoolctl"}
    for file in inside("exits"):
        imported = imports(PACKAGE / file)
        assert {name.split(".")[0] for name in imported} <= allowed, file
        ours = {name for name in imported if name.startswith("raee_serve.")}
        assert all(name.startswith(("raee_serve.errors", "raee_serve.exits")) for name in ours), (
            file,
            ours,
        )


def test_truncation_plan_needs_torch_only():
    roots = {name.split(".")[0] for name in imports(PACKAGE / "engine" / "plan.py")}
    assert "torch" in roots and "vllm" not in roots


def test_the_command_line_itself_imports_nothing_heavy():
    roots = {name.split(".")[0] for name in imports(PACKAGE / "cli.py")}
    assert not roots & {"torch", "transformers", "lancedb", "sentence_transformers", "vllm"}
