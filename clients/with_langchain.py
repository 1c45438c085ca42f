"""The same through LangChain: a chat answer with its decision, and one that is streamed.

Needs `pip install langchain-openai`.
"""

import argparse
import os

from langchain_openai import ChatOpenAI

QUESTION = "Name three things that float on water."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get("RAEE_BASE_URL", "http://localhost:8000/v1")
    parser.add_argument("--base-url", default=default)
    parser.add_argument("--model", default=os.environ.get("RAEE_MODEL", "smollm2-135m"))
    args = parser.parse_args()
    settings = {
        "base_url": args.base_url,
        "api_key": os.environ.get("OPENAI_API_KEY", "none"),
        "model": args.model,
        "temperature": 0,
        "max_tokens": 16,
        "include_response_headers": True,
    }

    answer = ChatOpenAI(**settings, extra_body={"raee": {"exit_layer": 20}}).invoke(QUESTION)
    print_decision(answer.response_metadata["headers"])
    print(answer.content)

    for chunk in ChatOpenAI(**settings).stream(QUESTION):
        if "headers" in chunk.response_metadata:  # the first one's
            print_decision(chunk.response_metadata["headers"])
        print(chunk.content, end="", flush=True)
    print()


def print_decision(headers: dict[str, str]) -> None:
    layer, layers = headers["x-raee-exit-layer"], headers["x-raee-num-layers"]
    print(f"[layer {layer} of {layers}: {headers['x-raee-reason']}]")


if __name__ == "__main__":
    main()
