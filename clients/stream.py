"""Stream a chat answer. The exit decision is in the headers, before the first token."""

import sys

from connection import argument_parser, connect


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("question", nargs="?", default="Name three things that float on water.")
    args = parser.parse_args()
    client, model = connect(args)

    response = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": args.question}],
        temperature=0,
        max_tokens=64,
        stream=True,
    )
    layer, layers = (response.headers[f"x-raee-{name}"] for name in ("exit-layer", "num-layers"))
    print(f"[{layer} of {layers} layers: {response.headers['x-raee-reason']}]", file=sys.stderr)
    for chunk in response.parse():
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
