"""What this process keeps of requests that are over."""

import gc
from collections import Counter, deque

OURS = ("raee_serve.", "raee_serve_patches.")
CONTAINERS = (dict, list, set, tuple, deque)


def kept():
    """By class of ours: how many instances there are, and how many items their attributes hold."""
    gc.unfreeze()  # vLLM hides what is there once an engine is up
    gc.collect()
    found = Counter()
    for thing in gc.get_objects():
        name = f"{type(thing).__module__}.{type(thing).__qualname__}"
        if not name.startswith(OURS):
            continue
        found[name] += 1
        if not name.endswith("SchedulerOutput"):  # a step's, whose size is that of its batch
            held = getattr(thing, "__dict__", {}).values()
            found[f"items of {name}"] += sum(len(v) for v in held if isinstance(v, CONTAINERS))
    return found


def grown(before, by):
    """What there are at least so many more of than `kept` found before."""
    return {name: more for name, more in (kept() - before).items() if more >= by}
