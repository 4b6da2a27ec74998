"""Tasks: problems, prompts, and the rewards that judge an answer."""
