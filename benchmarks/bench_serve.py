"""`vllm bench serve`, also where vLLM's CPU build is installed.

There the command of that name does not start, for it asks for the version of a package `vllm`, and
the CPU build is another. What it runs is called as it calls it; all flags are vLLM's.
"""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(description="vLLM's load generator")
    add_cli_args(parser)
    main(parser.parse_args())
