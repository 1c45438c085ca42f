"""MPQA: polarity of short opinion phrases."""

from raee_serve.table.datasets import LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="mpqa",
    prompt=CompletionPrompt("{text} It was"),
    labels=("terrible", "great"),
    local=LocalSet("mpqa"),
)
