"""The same through LiteLLM: a chat answer with its decision, and one that is streamed.

Needs `pip install litellm`, in an environment of its own: it asks for another openai package.
"""

import argparse
import os

import litellm

MESSAGES = [{"role": "user", "content": "Name three things that float on water."}]
HEADER = "llm_provider-x-raee-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get("RAEE_BASE_URL", "http://localhost:8000/v1")
    parser.add_argument("--base-url", default=default)
    parser.add_argument("--model", default=os.environ.get("RAEE_MODEL", "smollm2-135m"))
    args = parser.parse_args()
    request = {
        "model": f"openai/{args.model}",
        "api_base": args.base_url,
        "api_key": os.environ.get("OPENAI_API_KEY", "none"),
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
