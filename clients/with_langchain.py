"""The same through LangChain: a chat answer with its decision, and one that is streamed.

Needs `pip install langchain-openai`.
"""

from connection import argument_parser, connect
from langchain_openai import ChatOpenAI

QUESTION = "Name three things that float on water."


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    client, model = connect(args)
    settings = {
        "base_url": args.base_url,
        "api_key": client.api_key,
        "model": model,
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
