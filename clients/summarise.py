"""Summarise a text in a chat. The prompt matches a task's template, so no task is named."""

import sys

from connection import argument_parser, connect

NOTE = (
    "The village bakery has moved into the old fire station. There is room for a second oven, and "
    "the tall doors can stand open in summer. The baker kept the brass pole and slides down it "
    "every morning at four. Customers may try it too, but only after they have paid."
)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("text", nargs="?", default=NOTE, help="text to summarise, - for stdin")
    parser.add_argument("--template", default="Summarise in one sentence:\n\n{text}")
    args = parser.parse_args()
    client, model = connect(args)

    text = sys.stdin.read() if args.text == "-" else args.text
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": args.template.replace("{text}", text)}],
        temperature=0,
        max_tokens=64,
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
