"""TREC: what kind of answer a question asks for."""

from raee_serve.table.datasets import HubSet, LocalSet
from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task

TASK = Task(
    name="trec",
    prompt=CompletionPrompt("{text} The answer is a"),
    labels=("description", "entity", "abbreviation", "person", "location", "number"),
    local=LocalSet("trec"),
    # There: abbreviation, entity, description, human, location, numeric.
    hub=HubSet("CogComp/trec", gold_field="coarse_label", labels=(2, 1, 0, 3, 4, 5)),
)
