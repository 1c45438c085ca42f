"""CNN/DailyMail: summarise a news article."""

from raee_serve.table.datasets import HubSet, LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="cnndm",
    prompt=CompletionPrompt("{text}\nTL;DR:"),
    local=LocalSet("cnndm", text_field="document", gold_field="summary"),
    hub=HubSet(
        "abisee/cnn_dailymail", config="3.0.0", text_field="article", gold_field="highlights"
    ),
)
