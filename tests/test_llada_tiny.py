"""The small model that the repository carries: its rows, that none was trained on, its checkpoint, its training."""

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from blockinfer import LLM, SamplingParams
from evals.graders import grade
from evals.llada_tiny.data import ROW, Encoder, make_batch
from evals.llada_tiny.init import OFFSETS, initialise
from evals.llada_tiny.model import Shape, TinyLLaDA, attention_bias, rotate
from evals.llada_tiny.muon import orthogonal
from evals.llada_tiny.problems import SOURCES, drill, problem, split
from evals.llada_tiny.sample import sample_rows, sample_text
from evals.llada_tiny.study import Result, markdown, svg
from evals.llada_tiny.tokenizer import BOS, HEADER_END, MASK, chat_text
from evals.llada_tiny.train import rate_at
from evals.prompts import messages
from evals.rows import load_rows
from evals.settings import SAMPLE

FOLDER = Path(__file__).parents[1] / "evals" / "llada_tiny"
# the package's names are those of the functions
MODULES = {
    name: import_module(f"evals.llada_tiny.problems.{name}") for name in ("gsm8k", "math500", "mmlu", "hotpotqa")
}


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(FOLDER)


def asked(row):
    """What identifies a row for someone who is asked it."""
    return row["question"], row.get("context"), tuple(sorted(row.get("choices", ())))


def test_the_sample_is_what_its_command_writes():
    assert SAMPLE.read_text("utf-8") == sample_text()


def test_the_sample_s_rows():
    rows = load_rows(SAMPLE)
    assert [row["source"] for row in rows] == list(SOURCES) * 50
    assert len({row["id"] for row in rows}) == len({asked(row) for row in rows}) == 200


def test_the_sample_s_lengths(tokenizer):
    lengths = {source: [] for source in SOURCES}
    for row in sample_rows():
        answer = len(tokenizer(row["solution"], add_special_tokens=False).input_ids) + 1  # with the stop token
        assert answer <= 120
        lengths[row["source"]].append(answer - 1)
        prompt = tokenizer.apply_chat_template(messages(row), add_generation_prompt=True, return_dict=False)
        assert len(prompt) + 128 <= 512
    for source in ("gsm8k", "math500"):
        assert sum(length > 40 for length in lengths[source]) * 3 >= 50, source


@pytest.fixture
def draws(monkeypatch):
    """Every (keys, split asked for) of the draws that make problems."""
    drawn = []

    def recorded(rng, wanted, make, *name):
        value = split.draw(rng, wanted, make, *name)
        drawn.append(((*name, value), wanted))
        return value

    for module in MODULES.values():
        monkeypatch.setattr(module, "draw", recorded)
    return drawn


def test_no_row_was_trained_on(draws):
    """Structures, numbers, names and pairings of every row belong to the held-out split, and training draws none."""
    rows = sample_rows()
    heldout = {key for key, _ in draws}
    assert len(heldout) >= 200 and {split.split_of(*key) for key in heldout} == {"heldout"}
    draws.clear()
    rng = random.Random(0)
    trained = set()
    for number in range(8_000):
        row = problem(SOURCES[number % 4], rng, "train", rng.random())
        trained.add(asked(row))
    seen = {key for key, _ in draws}
    assert len(seen) > 8_000 and {split.split_of(*key) for key in seen} == {"train"}
    assert not trained & {asked(row) for row in rows}


def test_training_batches_draw_from_the_training_split_only(draws):
    encoder = Encoder(str(FOLDER / "tokenizer.json"))
    for number, level in enumerate((0.0, 0.5, 1.0)):
        make_batch(encoder, number, 2, level, 0)
    assert len(draws) > 50 and {wanted for _, wanted in draws} == {"train"}


@pytest.mark.parametrize(
    ("kind", "numbers", "same"),
    [
        ("expression", (2, 3, 4, 5, "-"), [(4, 5, 2, 3, "-")]),
        ("expression", (2, 3, 4, 5, "+"), []),
        ("linear", (2, 9, 3, "-"), "asks 5"),
        ("linear", (2, 9, 3, "+"), []),
    ],
)
def test_the_same_question_from_other_numbers_is_known(kind, numbers, same):
    build = MODULES["math500"].KINDS[kind][1]
    found = MODULES["math500"]._same_question(kind, numbers)
    assert all(build(*other) == build(*numbers) for other in found)
    if isinstance(same, list):
        assert found == same
    else:
        assert len(found) == 27  # every other b = 5 + 2k up to 60: 5, 7, 11, ..., 59


def result(row):
    """The answer without the generator: from the question's numbers, or what the last checked equation comes to."""
    numbers = [int(x) for x in re.findall(r"\d+", row["question"])]
    if "greatest common" in row["question"] or "gcd" in row["question"]:
        return math.gcd(*numbers)
    if "^" in row["question"]:
        return pow(*numbers)
    return int(re.findall(r"= (\d+)", row["solution"])[-1])


@pytest.mark.parametrize("source", SOURCES)
def test_the_generators_own_solutions_are_right(source):
    rng = random.Random(1)
    rows = [problem(source, rng, "train", rng.random()) for _ in range(300)]
    for row in rows:
        assert grade({"id": "x", **row}, row["solution"]).correct, row
        for left, value in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", row["solution"]):
            assert eval(left) == int(value), row["solution"]
        if source in ("gsm8k", "math500"):
            assert int(row["answer"]) == result(row), row
    assert len({asked(row) for row in rows}) > 250
    if source == "mmlu":
        assert all(len(set(row["choices"])) == 4 for row in rows)
        assert min(Counter(row["answer"] for row in rows).values()) > 40
    if source == "longbench_hotpotqa":
        for row in rows:
            assert row["context"].count(row["answer"]) >= 1


def test_a_two_hop_question_has_one_answer():
    """Follow the passages from the question's subject: each hop is stated once, and one word tells two things apart."""
    rng = random.Random(2)
    for _ in range(200):
        row = problem("longbench_hotpotqa", rng, "train")
        first, second, last = row["solution"].removeprefix("Facts: ").split(". ")
        passages = row["context"].removeprefix("Passages: ").removesuffix(".").split(". ")
        assert passages.count(first) == passages.count(second) == 1
        assert last == f"The answer is {row['answer']}."
        starts = Counter(passage.removeprefix("The ").split()[0] for passage in passages)
        assert set(starts.values()) <= {1, 2}


@pytest.mark.parametrize("make", [MODULES["hotpotqa"].hotpotqa, MODULES["hotpotqa"].recital])
def test_what_is_to_be_looked_up_is_the_same_token_everywhere(make):
    """Each token of the facts stands in the prompt as it stands in the answer, names at the beginning too."""
    encoder = Encoder(str(FOLDER / "tokenizer.json"))
    rng = random.Random(5)
    rows = [{"source": "longbench_hotpotqa", **make(rng, "train")} for _ in range(50)]
    for row, (prompt, _) in zip(rows, encoder(rows), strict=True):
        facts = row["solution"].removeprefix("Facts:").split(" The answer is")[0]
        assert set(encoder.tokenizer.encode(facts, add_special_tokens=False).ids) <= set(prompt), row


def test_a_drill_states_facts_of_the_passages():
    rng = random.Random(6)
    for level in (0.0, 0.5, 1.0):
        for _ in range(50):
            row = drill("longbench_hotpotqa", rng, "train", level)
            facts = row["solution"].removeprefix("Facts: ").removesuffix(".").split(". ")
            assert len(facts) in (4, 6, 8) and len(set(facts)) == len(facts)
            assert all(row["context"].count(f" {fact}.") == 1 for fact in facts)


def test_shopping_without_change_is_held_out_by_its_numbers():
    rng = random.Random(7)
    found = 0
    for wanted in split.SPLITS:
        for _ in range(300):
            row = problem("gsm8k", rng, wanted)
            numbers = re.findall(r"buys (\d+) \w+ for (\d+) dollars each and (\d+) \w+ for (\d+)", row["question"])
            if numbers and "pays with" not in row["question"]:
                found += 1
                assert split.split_of("gsm8k shopping", False, (*map(int, numbers[0]), 0)) == wanted, row
    assert found > 20


def test_a_packed_row_shows_every_masked_place_its_whole_prompt():
    encoder = Encoder(str(FOLDER / "tokenizer.json"))
    batch = make_batch(encoder, 0, 4, 1.0, 0)
    seen = attention_bias(*map(torch.from_numpy, (batch.documents, batch.segments)))[:, 0] == 0
    bos, end = (encoder.tokenizer.token_to_id(token) for token in (BOS, HEADER_END))
    for flat, target in zip(batch.loss_at[batch.loss_weight > 0], batch.targets[batch.loss_weight > 0], strict=True):
        row, place = divmod(int(flat), ROW)
        assert batch.tokens[row, place] == encoder.mask != target
        inside = (batch.documents[row] == batch.documents[row, place]).nonzero()[0]
        assert (batch.positions[row, inside] == range(len(inside))).all()
        prompt = inside[: (batch.tokens[row, inside] == end).nonzero()[0][-1] + 1]
        assert batch.tokens[row, prompt[0]] == bos and seen[row, place, prompt].all()
        assert not seen[row, place, [i for i in range(ROW) if i not in set(inside)]].any()


def test_the_first_weights_look_up_what_follows_an_equal_token():
    """Local heads find the places beside; matching heads find a token's like, what followed it, and what came next."""
    model = TinyLLaDA(Shape(vocab_size=500, bos_token_id=0, eos_token_id=1, mask_token_id=2))
    initialise(model, torch.Generator().manual_seed(0))
    tokens = torch.randperm(490, generator=torch.Generator().manual_seed(1))[:120] + 10
    tokens[80:100] = tokens[10:30]
    angles = torch.arange(120)[:, None] * model.frequencies
    bias = torch.zeros(1, 1, 120, 120)
    x = model.transformer["wte"](tokens)[None]
    weights = []
    for block in model.transformer["blocks"][:2]:
        q, k = (proj(block.attn_norm(x)).view(120, 4, 64).transpose(0, 1) for proj in (block.q_proj, block.k_proj))
        weights.append((rotate(q, angles) @ rotate(k, angles).mT / 8).softmax(-1))
        x = block(x, angles[None, None], bias)
    assert [weights[0][head].diagonal(offset).mean() > 0.4 for head, offset in enumerate(OFFSETS[0])] == [True] * 3
    # chance is 1 in 120
    assert [head.diagonal(-70)[13:28].mean() > 0.15 for head in weights[1][:3]] == [True] * 3


def test_muon_s_update_is_nearly_orthogonal():
    for shape in ((2, 16, 40), (1, 40, 16)):
        values = torch.linalg.svdvals(
            orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))).float()
        )
        assert values.min() > 0.5 and values.max() < 1.3


def test_the_learning_rate_ends_at_zero():
    assert rate_at(0, 0.0, 200) < 0.01 and rate_at(1_000, 0.3, 200) == 1.0
    assert 0.45 < rate_at(1_000, 0.675, 200) < 0.55 and rate_at(1_000, 1.0, 200) == 0.0


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ["A plain line.", "x = 3^2, 10% of 50", "Zürich, naïve, 東京, 🙂", "tabs\tand\n\nlines  ", "<b>&amp;"]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *ids]
    assert [len(tokenizer(str(n), add_special_tokens=False).input_ids) for n in (7, 42, 1999)] == [1, 2, 4]


def test_training_and_evaluation_see_the_same_prompt(tokenizer):
    rng = random.Random(3)
    for source in SOURCES:
        row = problem(source, rng, "train")
        assert chat_text(row) == tokenizer.apply_chat_template(
            messages(row), tokenize=False, add_generation_prompt=True
        )


def test_the_checkpoint_is_in_the_published_format(tokenizer):
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LLaDAModelLM"]
    assert config["vocab_size"] == len(tokenizer)
    for name, token in [("bos", "<|startoftext|>"), ("eos", "<|endoftext|>"), ("mask", MASK)]:
        assert config[f"{name}_token_id"] == tokenizer.convert_tokens_to_ids(token)
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "model.transformer.wte.weight" in names and "model.transformer.blocks.0.q_proj.weight" in names
    assert len(names) == 2 + 9 * config["n_layers"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc") < 16e6


def test_the_model_solves_what_it_was_trained_for():
    """Problems of the validation split, which is neither the sample nor the training data."""
    rng = random.Random(4)
    rows = [problem(source, rng, "validation") for source in ("gsm8k", "math500", "mmlu") for _ in range(4)]
    with LLM(str(FOLDER)) as llm:
        params = SamplingParams(max_tokens=96, unmasking="threshold")
        outputs = llm.chat([messages(row) for row in rows], params, use_tqdm=False)
    right = sum(grade({"id": "x", **row}, out.outputs[0].text).correct for row, out in zip(rows, outputs, strict=True))
    assert right >= 9, [out.outputs[0].text for out in outputs]


def test_training_runs_from_nothing(tmp_path):
    """The whole path on a CPU: data, tokenizer, steps, export, report; then the engine reads the folder."""
    command = [sys.executable, "-m", "evals.llada_tiny.train", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    options, *lines = map(json.loads, (tmp_path / "training.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines]
    assert len(losses) == 3 and losses[2] < losses[0] < 8.5
    assert options["steps"] == lines[-1]["step"] == 6
    assert all(set(line["content"]) == set(SOURCES) and len(line["lookups"]) == 2 for line in lines)
    assert "trained 6 steps" in done.stdout and "n = 4" in done.stdout
    with LLM(str(tmp_path)) as llm:
        (output,) = llm.generate("Tom has 3 apples.", SamplingParams(max_tokens=8), use_tqdm=False)
    assert output.finished


def test_the_study_s_table_and_drawing():
    results = [
        Result("vanilla", "threshold 0.9", dict.fromkeys(SOURCES, 0.5), 0.5, 4.0),
        Result("block", "threshold 0.9", dict.fromkeys(SOURCES, 0.25), 0.25, 8.0),
    ]
    assert "| `block` | threshold 0.9 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 8.00 |" in markdown(results, 3)
    marks = ElementTree.fromstring(svg(results)).findall(".//{*}circle[{*}title]")
    (x, y), (faster, lower) = ((float(m.get("cx")), float(m.get("cy"))) for m in marks)
    assert faster > x and lower > y
