"""How often the rows of an exit table exit at each layer, each asked as if it were not there."""

import argparse
import json

import numpy as np

from raee_serve.errors import TaskError
from raee_serve.retrieval.points_command import task_exits
from raee_serve.table.store import ExitTable


def table_exits(uri: str, task: str) -> list[float]:
    """[num_layers] share of the task's rows, under the budget that a server would use.

    Raises TableError for an unusable table, TaskError for a task of which it has not two rows with
    exit information.
    """
    table = ExitTable.open(uri)
    found = task_exits(table, task)
    if found is None:
        raise TaskError(f"task {task!r} has not two rows in {uri}")
    layers = np.array(found.layers())
    num_layers = table.metadata.backbone.num_layers
    return [round(float((layers == d).mean()), 4) for d in range(1, num_layers + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", required=True, metavar="DIR")
    parser.add_argument("--task", required=True)
    args = parser.parse_args()
    print(json.dumps(table_exits(args.table, args.task)))


if __name__ == "__main__":
    main()
