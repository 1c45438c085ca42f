"""Do prompts of another kind fall back to full depth, and prompts of the task itself not?

Texts of other tasks and random texts are looked up in a table as if they were prompts of one of its
tasks; what falls back has reason `far`. Beside them the task's own test rows. Needs no backbone.
"""

import argparse
import json
import random
import string
from collections.abc import Callable

from raee_serve.records import Reason
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.shortcuts import stored_shortcuts
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import DEFAULT_ROOT, shuffled_examples
from raee_serve.tasks.registry import get_task

FOREIGN = ("trec", "ag_news")
FAR_BAR, OWN_BAR = 0.95, 0.05
AT_ONCE = 64
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "


def texts_of(name: str, split: str, root: str, limit: int) -> list[str]:
    """The first rows of a seeded shuffle."""
    rows = shuffled_examples(get_task(name), "test" if split == "test" else "train", root, seed=0)
    return [row.text for row in rows[:limit]]


def random_texts(words: Callable[[random.Random], str], limit: int) -> list[str]:
    """Texts of 5 to 30 words, seeded."""
    draw = random.Random(0)
    return [" ".join(words(draw) for _ in range(draw.randint(5, 30))) for _ in range(limit)]


def letters(draw: random.Random) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 10)))


def characters(draw: random.Random) -> str:
    return "".join(draw.choices(CHARACTERS, k=draw.randint(2, 10)))


def far_share(retriever: ExitRetriever, task: str, texts: list[str]) -> float:
    lookups = [Lookup((task,), text) for text in texts]
    decisions = [
        decision
        for start in range(0, len(lookups), AT_ONCE)
        for decision in retriever.decide(lookups[start : start + AT_ONCE])
    ]
    return sum(decision.reason == Reason.FAR for decision in decisions) / len(decisions)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """The share that falls back, by kind of text; own-words is not a bar, see `main`."""
    metadata = ExitTable.open(args.table).metadata
    shortcuts = stored_shortcuts(args.table, None, metadata.backbone)
    retriever = ExitRetriever.open(args.table, backbone=metadata.backbone, shortcuts=shortcuts)
    vocabulary = sorted(
        {word for text in texts_of(args.task, "train", args.data, 10**9) for word in text.split()}
    )
    kinds = {args.task: texts_of(args.task, "test", args.data, args.limit)}
    kinds |= {name: texts_of(name, "test", args.data, args.limit) for name in FOREIGN}
    kinds["random characters"] = random_texts(characters, args.limit)
    kinds["random letters"] = random_texts(letters, args.limit)
    kinds["own words, shuffled"] = random_texts(lambda draw: draw.choice(vocabulary), args.limit)
    return {kind: far_share(retriever, args.task, texts) for kind, texts in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", required=True, metavar="DIR", help="with rows of --task")
    parser.add_argument("--task", default="mr")
    parser.add_argument("--data", default=DEFAULT_ROOT, metavar="ROOT")
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="texts of each kind")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    shares = measure(args)
    bars = {args.task: f"<= {OWN_BAR}"}
    bars |= dict.fromkeys((*FOREIGN, "random characters", "random letters"), f">= {FAR_BAR}")
    for kind, share in shares.items():
        # Words of the task's own rows are near them in any order: no bar, but worth knowing.
        print(f"{kind:22} {share:.3f}  {bars.get(kind, '')}")
    if args.json:
        print(json.dumps({kind: round(share, 4) for kind, share in shares.items()}))


if __name__ == "__main__":
    main()
