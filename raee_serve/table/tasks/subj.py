"""Subj: is a sentence about a movie opinion or plot."""

from raee_serve.table.datasets import HubSet, LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="subj",
    prompt=CompletionPrompt("{text} This is"),
    labels=("subjective", "objective"),
    local=LocalSet("subj"),
    hub=HubSet("SetFit/subj", gold_field="label_text", labels=("subjective", "objective")),
)
