"""The one place where a row becomes a prompt, in training and in evaluation alike."""

from collections.abc import Mapping
from typing import Any

from evals.questions.sources import LETTERS, SOURCES, grader_of

PROMPTS_VERSION: int = 1

INSTRUCTIONS = {
    "gsm8k": "Solve the problem step by step. End with: The answer is N.",
    "math500": "Solve the problem step by step. Put the final answer in \\boxed{}.",
    "mmlu": "State the fact that decides the question. End with the letter: The answer is X.",
    "longbench_hotpotqa": "Answer from the passages. Name the facts used, then end with: The answer is X.",
}
# For a user's own source: by its grader, the instructions above, and none for a function.
_OWN = {grader: INSTRUCTIONS[source] for source, grader in SOURCES.items()}
_PASSAGES = "Answer from the passages. "


def messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation that asks for `row`: context, question, choices and an instruction, as far as there are any.

    Of the known sources, only mmlu has choices and only longbench_hotpotqa a context.
    """
    source, grader = row["source"], grader_of(row)
    parts = [row["question"]]
    if row.get("choices") and (source not in SOURCES or grader == "choice"):
        parts.append("\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)))
    if row.get("context") and (source not in SOURCES or grader == "squad"):
        parts.insert(0, row["context"])
    if grader in _OWN:
        parts.append(_OWN[grader] if row.get("context") or source in SOURCES else _OWN[grader].removeprefix(_PASSAGES))
    return [{"role": "user", "content": "\n\n".join(parts)}]
