"""CoLA: is a sentence acceptable English."""

from raee_serve.table.datasets import HubSet, LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="cola",
    prompt=CompletionPrompt("{text} This is"),
    labels=("incorrect", "correct"),
    local=LocalSet("cola"),
    hub=HubSet("nyu-mll/glue", config="cola", text_field="sentence", test_split="validation"),
)
