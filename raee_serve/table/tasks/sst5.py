"""SST-5: a movie review sentence on five steps, very negative to very positive."""

from raee_serve.table.datasets import HubSet, LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="sst5",
    prompt=CompletionPrompt("{text} It was"),
    labels=("terrible", "bad", "okay", "good", "great"),
    local=LocalSet("sst5"),
    hub=HubSet(
        "SetFit/sst5",
        gold_field="label_text",
        labels=("very negative", "negative", "neutral", "positive", "very positive"),
    ),
)
