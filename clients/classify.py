"""Classify texts: several prompts in one request, each run at its own depth.

Naming a label task makes the server answer with exactly one of its labels.
"""

from connection import argument_parser, connect

TEXTS = [
    "The soup was cold and the waiter was rude.",
    "A beautiful film that I could watch again tomorrow.",
    "The battery died on the first day.",
]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("texts", nargs="*", default=TEXTS, help="texts to classify")
    parser.add_argument("--task", default="demo_sentiment", help="a task of the server's table")
    parser.add_argument("--template", default="{text} It was", help="that task's prompt")
    args = parser.parse_args()
    client, model = connect(args)

    response = client.completions.with_raw_response.create(
        model=model,
        prompt=[args.template.replace("{text}", text) for text in args.texts],
        temperature=0,
        extra_body={"raee": {"task": args.task}},
    )
    layers = response.headers["x-raee-exit-layer"].split(",")
    for text, choice, layer in zip(args.texts, response.parse().choices, layers, strict=True):
        print(f"{choice.text.strip():12} after layer {layer.strip():>2}: {text}")


if __name__ == "__main__":
    main()
