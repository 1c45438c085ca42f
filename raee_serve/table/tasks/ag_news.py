"""AG News: the topic of a news item."""

from raee_serve.table.datasets import HubSet, LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="ag_news",
    prompt=CompletionPrompt("{text} This is about"),
    labels=("world", "sports", "business", "technology"),
    local=LocalSet("ag_news"),
    hub=HubSet("fancyzhx/ag_news"),
)
