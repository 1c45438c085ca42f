"""What a look-up takes, alone, in batches, in a large table, and beside a busy engine.

- encoders: for each back end of the encoder, and static embeddings distilled from it, the time of
  one prompt and the rate of 32, the share of 12 nearest rows it agrees on with torch, and the
  accuracy of the neighbours' label vote, mean of the tasks (texts of RAEE_DATA needed).
- single: `ExitRetriever.decide` (encode, search, aggregate) of one prompt, 10,000 rows in memory.
- batch: the same for 32 prompts at once.
- ann: LanceDB's index over 1,000,000 rows, real embeddings with seeded jitter: the search of one
  prompt, and recall@12 against exact search.
- server: requests/s at concurrency 32 with depths retrieved / with the same depths forced by
  `raee.exit_layer`, in turns. --model, --dtype, --table, --task and --rounds are of this part.

The encoder uses one core. Prompts are never repeated, so no vector comes out of the cache.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import add_model_arguments
from benchmarks.machine import machine
from benchmarks.prompt_rows import BACKBONE, TASK, make_table, texts
from benchmarks.retrieval_encoders import compare_encoders
from benchmarks.retrieval_server import throughput_ratio
from raee_serve.retrieval.encoder import Encoder
from raee_serve.retrieval.lookup import Lookup
from raee_serve.retrieval.resources import BATCH_SIZE, DEFAULT_BACKEND
from raee_serve.retrieval.retriever import ExitRetriever
from raee_serve.table.index import KINDS, kind_for
from raee_serve.table.store import ExitTable
from raee_serve.tasks.datasets import DEFAULT_ROOT

PARTS = ("encoders", "single", "batch", "ann", "server")
BATCH, WARM_UP = 32, 20
K = 12


def single(retriever: ExitRetriever, prompts: Sequence[str]) -> dict[str, float]:
    """Milliseconds of one prompt at a time."""
    times = [_timed(lambda p=p: retriever.decide([Lookup((TASK,), p)])) * 1e3 for p in prompts]
    p50, p99 = np.percentile(times[WARM_UP:], [50, 99])
    print(f"one prompt     p50 {p50:.2f} ms, p99 {p99:.2f} ms ({len(times) - WARM_UP} prompts)")
    return {"single_p50_ms": round(float(p50), 2), "single_p99_ms": round(float(p99), 2)}


def batch(retriever: ExitRetriever, prompts: Sequence[str]) -> dict[str, float]:
    """Prompts/s, 32 at a time; the median batch."""
    lookups = [Lookup((TASK,), prompt) for prompt in prompts]
    batches = [lookups[i : i + BATCH] for i in range(0, len(lookups) - BATCH + 1, BATCH)]
    times = [_timed(lambda b=b: retriever.decide(b)) for b in batches][1:]
    rate = BATCH / float(np.median(times))
    print(f"{BATCH} prompts     {rate:.0f} prompts/s (median of {len(times)} batches)")
    return {"batch32_per_s": round(rate, 1)}


def ann(
    encoder: Encoder, prompts: Sequence[str], queries: Sequence[str], args: argparse.Namespace
) -> dict[str, float]:
    """A large table behind an index. Kept in --workdir, where it is made once."""
    uri = str(Path(args.workdir) / f"ann-{args.ann_rows}")
    if not Path(uri).is_dir():
        print(f"making {args.ann_rows:,} rows ...", flush=True)
        make_table(uri, encoder, prompts, args.ann_rows, has_probes=False)
    table = ExitTable.open(uri)
    kind = args.kind or kind_for(args.ann_rows)
    if table.index.kind != kind:
        print(f"building {kind} ...", flush=True)
        seconds = _timed(lambda: table.build_index(kind))
        print(f"index built in {seconds:.0f} s", flush=True)
    asked = encoder.encode(queries)
    for query in asked[:WARM_UP]:
        table.index.nearest([TASK], query[None], K)
    found, times = [], []
    for query in asked[WARM_UP:]:
        start = time.perf_counter()
        found += [keys for keys, _ in table.index.nearest([TASK], query[None], K)]
        times.append((time.perf_counter() - start) * 1e3)
    exact = _exact(table, asked[WARM_UP:])
    recall = float(
        np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, exact, strict=True)])
    )
    p50 = float(np.median(times))
    memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.ann_rows:,} rows behind {kind}: p50 {p50:.2f} ms, p99 "
        f"{np.percentile(times, 99):.2f} ms, recall@{K} {recall:.3f}; {memory_gb:.1f} GB at most"
    )
    return {"ann_p50_ms": round(p50, 2), "ann_recall": round(recall, 4)}


def _exact(table: ExitTable, queries: NDArray[np.float32]) -> list[NDArray[np.uint64]]:
    """Keys of the K nearest rows of each query, by comparing it with all of them."""
    keys = table.keys(TASK)
    best = np.full((len(queries), K), -np.inf, np.float32)
    rows = np.zeros((len(queries), K), np.int64)
    first = 0
    for block in table.vectors(TASK, 50_000):
        similarities = np.concatenate([best, queries @ block.T], axis=1)
        at = np.broadcast_to(np.arange(first, first + len(block)), (len(queries), len(block)))
        candidates = np.concatenate([rows, at], axis=1)
        kept = np.argpartition(similarities, -K, axis=1)[:, -K:]
        best = np.take_along_axis(similarities, kept, axis=1)
        rows = np.take_along_axis(candidates, kept, axis=1)
        first += len(block)
    return list(keys[rows])


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": machine(), "encoder_backend": args.encoder_backend}
    if "encoders" in args.parts:
        result["encoders"] = compare_encoders(args.data)
    if {"single", "batch", "ann"} & set(args.parts):
        encoder = Encoder("minilm", backend=args.encoder_backend)
        prompts = texts("train", args.rows, args.data)
        asked = texts("test", 1200, args.data)
        print(f"{len(prompts):,} prompts make rows, {len(asked):,} are looked up", flush=True)
        if {"single", "batch"} & set(args.parts):
            uri = str(Path(args.workdir) / f"rows-{args.rows}")
            make_table(uri, encoder, prompts, args.rows, has_probes=True)
            options = {"backbone": BACKBONE, "encoder_backend": args.encoder_backend}
            if "single" in args.parts:
                result |= single(ExitRetriever.open(uri, **options), asked[:500])
            if "batch" in args.parts:
                result |= batch(ExitRetriever.open(uri, **options), asked[-700:])
        if "ann" in args.parts:
            result |= ann(encoder, prompts, asked[:220], args)
    if "server" in args.parts:
        result |= throughput_ratio(args)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--encoder-backend", default=DEFAULT_BACKEND, choices=BATCH_SIZE)
    parser.add_argument("--data", default=DEFAULT_ROOT, help="directory of the data sets")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--ann-rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=KINDS, help="of the index; default by size")
    parser.add_argument("--workdir", help="where tables are made and kept (default: nowhere)")
    add_model_arguments(parser)
    parser.add_argument("--table", help="default: one of the task")
    parser.add_argument("--task", default="demo_summary")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        args.workdir = args.workdir or scratch
        result = measure(args)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
