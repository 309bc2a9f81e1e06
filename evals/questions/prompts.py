"""The one place where a row becomes a prompt, in training and in evaluation alike."""

from collections.abc import Mapping
from typing import Any

PROMPTS_VERSION: int = 1

INSTRUCTIONS = {
    "gsm8k": "Solve the problem step by step. End with: The answer is N.",
    "math500": "Solve the problem step by step. Put the final answer in \\boxed{}.",
    "mmlu": "State the fact that decides the question. End with the letter: The answer is X.",
    "longbench_hotpotqa": "Answer from the passages. Name the facts used, then end with: The answer is X.",
}


def messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation that asks for `row`: fields source and question; choices for mmlu, context for hotpotqa."""
    source = row["source"]
    if source not in INSTRUCTIONS:
        raise ValueError(f"row {row.get('id')!r}: unknown source {source!r}; known are {', '.join(INSTRUCTIONS)}")
    parts = [row["question"], INSTRUCTIONS[source]]
    if source == "mmlu":
        parts.insert(1, "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)))
    if source == "longbench_hotpotqa" and row.get("context"):
        parts.insert(0, row["context"])
    return [{"role": "user", "content": "\n\n".join(parts)}]
