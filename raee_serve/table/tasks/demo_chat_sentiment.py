"""Demo: sentiment of short reviews written for this project, asked in a chat."""

from raee_serve.table.datasets import DemoSet
from raee_serve.table.prompts import ChatPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="demo_chat_sentiment",
    prompt=ChatPrompt(
        "Is this review negative or positive? Answer with one word.\n\nReview: {text}"
    ),
    labels=("negative", "positive"),
    demo=DemoSet("sentiment"),
)
