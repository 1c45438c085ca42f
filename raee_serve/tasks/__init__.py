"""What is asked of the backbone: tasks, their prompts, and where their rows come from."""
