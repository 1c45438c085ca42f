"""XSum after two examples written for this project: for backbones that only continue a text."""

from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task
from raee_serve.table.tasks.xsum import TASK as XSUM

SHOTS = """\
Article: The bridge had been shut to lorries since an inspection in March found cracks in two of \
its steel cables. Engineers have replaced both and tested them for a week with trucks full of \
sand. A spokesman of the road authority said that the cables would now last for thirty years. \
Haulage firms had complained that the diversion cost every driver an hour a day.
Summary: Lorries may use a bridge again after two of its cracked cables were replaced.

Article: Anna Berg, 17, took up rowing only three years ago, when her school was given an old \
boat. On Sunday she finished four seconds ahead of the favourite, who has won the title twice. \
Berg said that she had not looked up once in the last hundred metres. She will row for the \
national team in June, and wants to become a vet.
Summary: A 17-year-old who began to row three years ago has won the national title.

"""

TASK = Task(
    name="xsum_shots",
    prompt=CompletionPrompt(SHOTS + "Article: {text}\nSummary:"),
    local=XSUM.local,
    hub=XSUM.hub,
)
