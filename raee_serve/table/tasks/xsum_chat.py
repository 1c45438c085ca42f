"""XSum, asked in a chat: for backbones tuned to follow instructions."""

from raee_serve.table.prompts import ChatPrompt
from raee_serve.table.task import Task
from raee_serve.table.tasks.xsum import TASK as XSUM

TASK = Task(
    name="xsum_chat",
    prompt=ChatPrompt("Summarise this article in one sentence:\n\n{text}"),
    local=XSUM.local,
    hub=XSUM.hub,
)
