"""Errors that a user can cause; each message names the bad value and what is allowed."""


class RaeeError(ValueError):
    """Base of all errors raised on purpose by raee-serve."""


class TableError(RaeeError):
    """An exit table that is missing, corrupt or otherwise unusable."""


class BindingError(TableError):
    """An exit table bound to another backbone, encoder or prompt template; names both sides."""


class TaskError(RaeeError):
    """An unknown task, or data that does not fit a task."""


class CheckpointError(RaeeError):
    """A model or encoder that cannot be resolved to a usable checkpoint."""
