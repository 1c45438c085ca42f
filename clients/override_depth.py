"""Ask the same at several depths: a layer number, "full", or "auto" for the retrieved one."""

from connection import argument_parser, connect


def depth(value: str) -> int | str:
    return value if value in ("full", "auto") else int(value)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--prompt", default="A film that I could watch again tomorrow. It was")
    parser.add_argument("--task", default="demo_sentiment", help="a task of the server's table")
    parser.add_argument("--head", help="what answers a label task: probe or plain")
    parser.add_argument("--budget", type=float, help="share of the best exit's quality to keep")
    parser.add_argument(
        "depths", nargs="*", type=depth, default=[6, 12, "full", "auto"], help="exit layers"
    )
    args = parser.parse_args()
    client, model = connect(args)

    for exit_layer in args.depths:
        raee = {"exit_layer": exit_layer, "task": args.task}
        raee |= {"head": args.head, "budget": args.budget}
        response = client.completions.with_raw_response.create(
            model=model, prompt=args.prompt, temperature=0, extra_body={"raee": raee}
        )
        layer, reason = (response.headers[f"x-raee-{name}"] for name in ("exit-layer", "reason"))
        print(f"{exit_layer!s:>5}: layer {layer:>2} ({reason}): {response.parse().choices[0].text}")


if __name__ == "__main__":
    main()
