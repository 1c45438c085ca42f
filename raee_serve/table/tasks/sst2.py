"""SST-2: does a movie review sentence praise or pan."""

from raee_serve.table.datasets import HubSet, LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="sst2",
    prompt=CompletionPrompt("{text} It was"),
    labels=("terrible", "great"),
    local=LocalSet("sst2"),
    hub=HubSet("stanfordnlp/sst2", text_field="sentence", test_split="validation"),
)
