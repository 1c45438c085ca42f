"""MR: sentiment of movie review sentences (Pang and Lee)."""

from raee_serve.table.datasets import HubSet, LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="mr",
    prompt=CompletionPrompt("{text} It was"),
    labels=("terrible", "great"),
    local=LocalSet("mr"),
    hub=HubSet("cornell-movie-review-data/rotten_tomatoes"),
)
