"""What servers are asked under load: one label, or a summary."""

from dataclasses import dataclass

from raee_serve.errors import TaskError
from raee_serve.tasks.datasets import shuffled_examples
from raee_serve.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Asked:
    """One request's text and gold answer."""

    task: Task
    text: str
    gold: int | str


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of traffic.

    output_len: tokens of every answer, whatever the model would say.
    rows: requests of a run at saturation.
    """

    name: str
    tasks: tuple[Task, ...]
    output_len: int
    rows: int

    def __post_init__(self) -> None:
        if len({type(task.prompt) for task in self.tasks}) > 1:
            names = ", ".join(task.name for task in self.tasks)
            raise TaskError(f"{self.name} needs tasks, all completions or all chats, not: {names}")

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.tasks[0].render("a text"), str)

    @property
    def has_lists(self) -> bool:
        """Whether one request can be a list of prompts for labels."""
        return not self.is_chat and all(task.kind == "labels" for task in self.tasks)


class Texts:
    """Test rows of a shape's tasks, each task in turn, the same in every run of the benchmark.

    A text is handed out once, so that no look-up finds it embedded already; of a task that has no
    further ones they come again with a number added.
    """

    def __init__(self, shape: Shape, root: str | None, max_words: int) -> None:
        """max_words: longer documents are cut to their beginning; label tasks' texts are not."""
        self._tasks = shape.tasks
        self._max_words = max_words
        self._rows = [shuffled_examples(task, "test", root, seed=0) for task in shape.tasks]
        self._next = 0

    def take(self, count: int) -> list[Asked]:
        taken = [self._nth(n) for n in range(self._next, self._next + count)]
        self._next += count
        return taken

    def _nth(self, n: int) -> Asked:
        row, which = divmod(n, len(self._tasks))
        task, rows = self._tasks[which], self._rows[which]
        again, position = divmod(row, len(rows))
        text, gold = rows[position].text, rows[position].gold
        if task.kind == "free-text":
            text = " ".join(text.split()[: self._max_words])
        return Asked(task, f"{text} {again}" if again else text, gold)
