"""Commits to a LanceDB table that others may be writing to: whole or not at all, and in a row.

LanceDB commits optimistically: a commit is refused if another that touched the same rows came
first. Each of ours rewrites one record (`records.Change`), so any two conflict. A merge is then
computed anew on the newer version by LanceDB itself; what it leaves to its caller is retried here.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa

from raee_serve.table.columns import records_to_arrow
from raee_serve.table.edits import Edit, sql_list
from raee_serve.table.records import CHANGE, RECORD, Change

ATTEMPTS = 20
LONGEST_PAUSE_S = 2.0
CONFLICT = re.compile("commit conflict|incompatible transaction|too many concurrent", re.IGNORECASE)
"""How LanceDB says that another writer came first; the commit has not happened then."""

Result = TypeVar("Result")


def commit(exits: Any, edit: Edit) -> None:
    """Carries out `edit` on the latest version of a LanceDB table, whose handle then shows it."""
    replaced = {**edit.records, CHANGE: Change(edit.what).to_json()}
    records = records_to_arrow({**edit.new_records, **replaced}, exits.schema, edit.blobs)
    source = records if edit.rows is None else pa.concat_tables([edit.rows, records])
    where = f"target.task = '{RECORD}' AND target.id IN ({sql_list(list(replaced))})"
    merge = exits.merge_insert(["id", "task"])
    merge = merge.when_matched_update_all(where=where).when_not_matched_insert_all()
    if edit.delete is not None:
        merge = merge.when_not_matched_by_source_delete(edit.delete)
    patiently(exits, lambda: merge.execute(source))


def patiently(exits: Any, work: Callable[[], Result]) -> Result:
    """Does `work`, again on the latest version as long as other writers come first."""
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except (RuntimeError, OSError, ValueError) as error:
            if not CONFLICT.search(str(error)):
                raise
        time.sleep(random.uniform(0, min(LONGEST_PAUSE_S, 0.05 * 2**attempt)))
        exits.checkout_latest()
    return work()
