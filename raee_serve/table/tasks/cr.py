"""CR: sentiment of customer reviews (Hu and Liu)."""

from raee_serve.table.datasets import HubSet, LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="cr",
    prompt=CompletionPrompt("{text} It was"),
    labels=("terrible", "great"),
    local=LocalSet("cr"),
    hub=HubSet("SetFit/CR", gold_field="label_text", labels=("negative", "positive")),
)
