"""CNN/DailyMail after two examples written for this project: for backbones that only continue."""

from raee_serve.table.prompts import CompletionPrompt
from raee_serve.table.task import Task
from raee_serve.table.tasks.cnndm import TASK as CNNDM

SHOTS = """\
Article: A ferry with 140 people on board ran onto a sandbank outside the harbour on Monday \
morning. Nobody was hurt. The captain said that a buoy had drifted away in the storm of the \
weekend and that he had steered by its old place on the chart. Lifeboats took the passengers \
ashore within two hours, and the ferry came free by itself with the next tide. The port \
authority has opened an inquiry and put a new buoy in place.
Summary: A ferry with 140 people ran onto a sandbank outside the harbour. The captain steered by \
a buoy that had drifted away in a storm. All passengers were taken ashore unhurt.

Article: The city's oldest cinema will not close after all. Its owner, who is 81, had announced \
in spring that she would sell the building to a supermarket chain because the roof leaked and \
visitors stayed away. A group of students then collected 90,000 in small donations, repaired the \
roof with the help of a retired builder, and will run the house for ten years at a rent of one \
coin a year. The first film is shown on Friday.
Summary: The city's oldest cinema stays open. Students collected 90,000 in donations and \
repaired its roof. They will run it for ten years at a token rent.

"""

TASK = Task(
    name="cnndm_shots",
    prompt=CompletionPrompt(SHOTS + "Article: {text}\nSummary:"),
    local=CNNDM.local,
    hub=CNNDM.hub,
)
