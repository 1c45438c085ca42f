"""Demo: sentiment of short reviews written for this project, as a completion."""

from raee_serve.table.datasets import DemoSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="demo_sentiment",
    prompt=CompletionPrompt("{text} It was"),
    labels=("terrible", "great"),
    demo=DemoSet("sentiment"),
)
