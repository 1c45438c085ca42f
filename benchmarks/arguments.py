"""What several benchmarks are told in the same way."""

from argparse import ArgumentParser

import torch

from raee_serve.table.probe import default_dtype


def add_model_arguments(parser: ArgumentParser, model: str = "smollm2-135m") -> None:
    """--model, with its default, and --dtype."""
    parser.add_argument("--model", default=model, help="default: %(default)s")
    parser.add_argument(
        "--dtype",
        default=str(default_dtype(torch.device("cpu"))).removeprefix("torch."),
        choices=["bfloat16", "float32"],
        help="default: what this CPU computes in (%(default)s)",
    )
