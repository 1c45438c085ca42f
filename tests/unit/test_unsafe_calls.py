"""Nothing of ours runs what it reads: no pickle, no eval, no loader that may; from the source."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "raee_serve").rglob("*.py"), *(ROOT / "patches").glob("*.py")]

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen"}
CALLS |= {"torch.load", "torch.save", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}
CALLS |= {"pandas.read_pickle", "pd.read_pickle"}
FLAGS = {"allow_pickle", "trust_remote_code", "shell"}
"""Arguments that must not be given, whatever their value."""

ALLOWED = {("table/ray_build.py", "pickle")}
"""Between the workers of one Ray cluster, which pickles whatever it sends anyway."""


def unsafe(source: str) -> set[str]:
    """Names of what a source imports, calls or passes that it should not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0]} & MODULES
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & CALLS
        elif isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & CALLS
            found |= {keyword.arg for keyword in node.keywords if keyword.arg} & FLAGS
    return found


def test_nothing_unsafe_is_used():
    assert len(FILES) > 50
    found = {
        (str(file.relative_to(ROOT)).removeprefix("raee_serve/"), name)
        for file in FILES
        for name in unsafe(file.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from pickle import loads", "pickle"),
        ("import joblib.numpy_pickle as j", "joblib"),
        ("x = eval('1')", "eval"),
        ("torch.load(path, weights_only=True)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("yaml.load(text, Loader=yaml.SafeLoader)", "yaml.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("subprocess.run('ls', shell=True)", "shell"),
        ("AutoModel.from_pretrained(name, trust_remote_code=False)", "trust_remote_code"),
    ],
)
def test_the_scan_finds_it(source, name):
    assert name in unsafe(source)


def test_the_scan_leaves_the_harmless_alone():
    assert not unsafe("model.eval()\nyaml.safe_load(x)\nre.compile('a')\njson.loads(y)")
