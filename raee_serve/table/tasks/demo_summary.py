"""Demo: summarise short notes written for this project, asked in a chat."""

from raee_serve.table.datasets import DemoSet
from raee_serve.table.prompts import ChatPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="demo_summary",
    prompt=ChatPrompt("Summarise in one sentence:\n\n{text}"),
    demo=DemoSet("summary", text_field="document", gold_field="summary"),
)
