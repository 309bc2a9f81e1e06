"""Questions with choices by the likelihood of the letter, as lm-eval asks them: one forward a question and no answer to
grade, so that base models can be measured."""

from typing import Any

from blockinfer import LLM, ChoiceOutput, ScoringParams
from evals.questions.prompts import messages
from evals.questions.rows import Ask, Row, encode_for_letter
from evals.questions.sources import LETTERS
from evals.results.wilson import wilson_interval
from evals.runs.configurations import LIKELIHOOD
from evals.runs.run import Run


def letters(llm: LLM, rows: list[Row], ask: Ask = messages) -> list[ChoiceOutput]:
    """Of each row the probabilities of its choices' letters, " A" and so on, after its prompt and "The answer is".

    Raises ValueError if a prompt and a letter are longer than the model takes.
    """
    encode = llm.tokenizer.encode
    encoded = [encode(f" {letter}", add_special_tokens=False) for letter in LETTERS]
    choices = [encoded[: len(row["choices"])] for row in rows]
    prompts = [{"prompt_token_ids": encode_for_letter(row, llm.tokenizer, ask)} for row in rows]
    return llm.choose(prompts, choices, ScoringParams(seed=0), use_tqdm=False)


def figures(
    rows: list[Row], outputs: list[ChoiceOutput], seconds: float | None, generated: list[Run], all_rows: list[Row]
) -> dict[str, Any]:
    """seconds: of a round. generated: runs that answered all_rows, these among them, by generation."""
    right = sum(LETTERS[output.best] == row["answer"] for row, output in zip(rows, outputs, strict=True))
    return {
        "right": right,
        "accuracy": right / len(rows),
        "accuracy_interval": wilson_interval(right, len(rows)),
        "seconds": seconds,
        "forwards_by_request": sum(output.nfe for output in outputs),
        "generation": [_of_run(run, all_rows, {row["id"] for row in rows}) for run in generated],
    }


def _of_run(run: Run, rows: list[Row], ids: set[str]) -> dict[str, Any]:
    """The seconds are known only if it answered no other rows."""
    grades = [grade.correct for row, grade in zip(rows, run.grades, strict=True) if row["id"] in ids]
    seconds = run.median_seconds if len(grades) == len(rows) else None
    case = run.case
    return {
        "configuration": case.name,
        "right": sum(grades),
        "accuracy_interval": wilson_interval(sum(grades), len(grades)),
        "seconds": seconds,
    }


def table(infos: list[dict[str, Any]]) -> list[str]:
    """A line for the likelihood, and one for each configuration by generation."""
    lines = []
    for info in infos:
        lines.append(_line("by the letter's likelihood", info, info["n"]))
        lines += [_line(f"by generation, {run['configuration']}", run, info["n"]) for run in info["generation"]]
    return lines


def _line(name: str, info: dict[str, Any], number: int) -> str:
    low, high = info["accuracy_interval"]
    share = (
        f"{info['right']} of {number} right, {100 * info['right'] / number:.0f} % ({100 * low:.0f}-{100 * high:.0f})"
    )
    return f"{name:<44}{share}" + (f", {info['seconds']:.1f} s" if info["seconds"] else "")


def about(rows: list[Row], environment: dict[str, Any]) -> dict[str, Any]:
    """What the figures depend on."""
    return environment | {LIKELIHOOD: rows[0]["source"], "n": len(rows)}
