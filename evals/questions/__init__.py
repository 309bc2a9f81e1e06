"""The questions, and how answers are judged: rows, prompts, graders."""
