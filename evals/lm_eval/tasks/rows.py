"""How the tasks of this folder use a row of sample_200.jsonl."""

from evals.questions.graders import grade
from evals.questions.prompts import messages


def arithmetic(docs):
    return docs.filter(lambda row: row["source"] == "gsm8k")


def four_choices(docs):
    return docs.filter(lambda row: row["source"] == "mmlu")


def prompt(row):
    (message,) = messages(row)
    return message["content"]


def graded(row, results):
    return {"acc": float(grade(row, results[0]).correct)}


def letter(row):
    return "ABCD".index(row["answer"])
