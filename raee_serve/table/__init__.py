"""Exit tables: what a task is, and how its rows are computed and kept."""
