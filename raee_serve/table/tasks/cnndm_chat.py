"""CNN/DailyMail, asked in a chat: for backbones tuned to follow instructions."""

from raee_serve.table.prompts import ChatPrompt
from raee_serve.table.task import Task
from raee_serve.table.tasks.cnndm import TASK as CNNDM

TASK = Task(
    name="cnndm_chat",
    prompt=ChatPrompt("Summarise this article in three short sentences:\n\n{text}"),
    local=CNNDM.local,
    hub=CNNDM.hub,
)
