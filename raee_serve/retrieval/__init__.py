"""From a prompt to its exit decision: embed, search, aggregate."""
