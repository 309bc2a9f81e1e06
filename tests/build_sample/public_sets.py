"""Invented records of the public sets, and files such as hold them."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NUMBER = 12
# the prompt that Xnhyacinth/LongBench holds its records in
ORDER = "Answer the question based on the given passages. Only give me the answer and do not output any other words."


def gsm8k(i):
    solution = f"Half of {2 * i} is <<{2 * i}/2={i}>>{i}.\nWith 1,200 more: <<1200+{i}={1200 + i}>>{1200 + i}\n"
    return {"question": f"Ann has {2 * i} pears. How many?", "answer": f"{solution}#### {1200 + i:,}"}


def math500(i):
    record = {"problem": f"Find ${i}/2$.", "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$."}
    about = {"subject": "Algebra", "level": 1 + i % 5, "unique_id": f"test/algebra/{100 + i}.json"}
    return record | {"answer": f"\\frac{{{i}}}{{2}}"} | about


def mmlu(i):
    choices = [f"{i + k} legs" for k in range(4)]
    return {"question": f"A bug of sort {i}:", "subject": "zoology", "choices": choices, "answer": i % 4}


def longbench(i, question="question"):
    about = {"length": 10, "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": f"{i:024x}"}
    passages = f"Passage 1:\nBo\nBo {i} is from Rome.\nPassage 2:\nRome\nRome is in Italy {i}."
    return {question: f"Where is Bo {i} from?", "context": passages, "answers": [f"Italy {i}", "Italy"]} | about


def longbench_wrapped(i):
    record = longbench(i)
    context = f"{ORDER}\n\nThe following are given passages.\n{record['context']}\n\n{ORDER}\n\n"
    more = {"answer_prefix": "Answer:", "task": "hotpotqa", "max_new_tokens": 52}
    return record | {"context": context, "question": f"Question: {record['question']}\n"} | more


def readme(*configs):
    """A card as on the Hub: its configs, each with the files of its splits."""
    lines = ["---", "license: mit"] + ["configs:"] * bool(configs)
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for s in ("train", "test") for line in (f"  - split: {s}", f"    path: {config}/{s}-*")]
    return "\n".join([*lines, "---", "", "# A set"])


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_lines(path, records):
    write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_parquet(path, records, features=None):
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(records, features=features).to_parquet(str(path))


# where a bare copy has each set's test split
FILES = {
    gsm8k: "openai/gsm8k/main/test.jsonl",
    math500: "HuggingFaceH4/MATH-500/test.jsonl",
    mmlu: "cais/mmlu/all/test.jsonl",
    longbench: "THUDM/LongBench/data/hotpotqa.jsonl",
}


def replace(bare, make, records):
    """Puts other records into a set's test split, and takes its other splits away: a column has one type in all."""
    for file in (bare / FILES[make]).parent.iterdir():
        file.unlink()
    write_lines(bare / FILES[make], records)


def without(row, field):
    return {key: value for key, value in row.items() if key != field}
