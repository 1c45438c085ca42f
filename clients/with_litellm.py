"""The same through LiteLLM: a chat answer with its decision, and one that is streamed.

Needs `pip install litellm`, in an environment of its own: it asks for another openai package.
"""

import litellm
from connection import argument_parser, connect

MESSAGES = [{"role": "user", "content": "Name three things that float on water."}]
HEADER = "llm_provider-x-raee-"


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    client, model = connect(args)
    request = {
        "model": f"openai/{model}",
        "api_base": args.base_url,
        "api_key": client.api_key,
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 16,
    }

    answer = litellm.completion(**request, extra_body={"raee": {"exit_layer": 20}})
    print_decision(answer)
    print(answer.choices[0].message.content)

    chunks = litellm.completion(**request, stream=True)
    print_decision(chunks)
    for chunk in chunks:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def print_decision(answer: object) -> None:
    headers = answer._hidden_params["additional_headers"]  # where LiteLLM keeps a server's own
    layer, reason = headers[f"{HEADER}exit-layer"], headers[f"{HEADER}reason"]
    print(f"[layer {layer} of {headers[f'{HEADER}num-layers']}: {reason}]")


if __name__ == "__main__":
    main()
