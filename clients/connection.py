"""What every example shares: where the server is, and which model it serves."""

import argparse
import os

from openai import OpenAI


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--base-url",
        default=os.environ.get("RAEE_BASE_URL", "http://localhost:8000/v1"),
        help="the server's OpenAI API (default: RAEE_BASE_URL, else %(default)s)",
    )
    parser.add_argument(
        "--model",
        default=os.environ.get("RAEE_MODEL"),
        help="served model name (default: RAEE_MODEL, else the server's first)",
    )
    return parser


def connect(args: argparse.Namespace) -> tuple[OpenAI, str]:
    """The client, and the name of the model to ask for."""
    client = OpenAI(base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    return client, args.model or client.models.list().data[0].id
