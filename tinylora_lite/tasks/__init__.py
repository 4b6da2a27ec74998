"""Tasks: problems, prompts, and the rewards that score an answer."""
