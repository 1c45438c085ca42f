"""Print what the server decided about a prompt, and why."""

from connection import argument_parser, connect

MEANINGS = {
    "x-raee-exit-layer": "decoder layers that were run",
    "x-raee-exit-head": "what turned the last layer's state into logits",
    "x-raee-num-layers": "decoder layers there are",
    "x-raee-reason": "why this many",
    "x-raee-task": "task that the prompt belongs to",
    "x-raee-distance": "cosine distance to the nearest table row",
    "x-raee-lookup-ms": "milliseconds spent on the look-up",
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("prompt", nargs="?", default="The bed creaked all night. It was")
    parser.add_argument("--task", default="demo_sentiment", help='a task, or "" to name none')
    args = parser.parse_args()
    client, model = connect(args)

    response = client.completions.with_raw_response.create(
        model=model,
        prompt=args.prompt,
        temperature=0,
        extra_body={"raee": {"task": args.task} if args.task else {}},
    )
    print(args.prompt + response.parse().choices[0].text)
    for header, meaning in MEANINGS.items():
        print(f"{header:18} {response.headers[header]:15} {meaning}")


if __name__ == "__main__":
    main()
