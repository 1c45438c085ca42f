"""XSum: summarise a news article in one sentence."""

from raee_serve.table.datasets import HubSet, LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="xsum",
    prompt=CompletionPrompt("{text}\nTL;DR:"),
    local=LocalSet("xsum", text_field="document", gold_field="summary"),
    hub=HubSet("EdinburghNLP/xsum", text_field="document", gold_field="summary"),
)
