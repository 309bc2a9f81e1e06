"""The small model's training: its first weights, its batches, its optimizer, and the whole path."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from blockinfer import LLM, SamplingParams
from evals.llada_tiny import train
from evals.llada_tiny.data import DIGITS_MASKED, ROW, WHOLLY_MASKED, Encoder, document, make_batch
from evals.llada_tiny.evaluate import letters, lookups
from evals.llada_tiny.init import OFFSETS, initialise
from evals.llada_tiny.model import Shape, TinyLLaDA, attention_bias, load, rotate
from evals.llada_tiny.muon import orthogonal
from evals.llada_tiny.problems import SOURCES, drill, problem
from evals.llada_tiny.problems.hotpotqa import hotpotqa, recital
from evals.llada_tiny.progress import Log, State
from evals.llada_tiny.tokenizer import BOS, HEADER_END
from evals.llada_tiny.train import rate_at
from evals.runs.settings import TINY_MODEL


@pytest.mark.parametrize("make", [hotpotqa, recital])
def test_what_is_to_be_looked_up_is_the_same_token_everywhere(make):
    """Each token of the facts stands in the prompt as it stands in the answer, names at the beginning too."""
    encoder = Encoder(str(TINY_MODEL / "tokenizer.json"))
    rng = random.Random(5)
    rows = [{"source": "longbench_hotpotqa", **make(rng, "train")} for _ in range(50)]
    for row, (prompt, _) in zip(rows, encoder(rows), strict=True):
        facts = row["solution"].removeprefix("Facts:").split(" The answer is")[0]
        assert set(encoder.tokenizer.encode(facts, add_special_tokens=False).ids) <= set(prompt), row


def test_a_letter_is_the_same_token_before_its_choice_and_in_the_answer():
    encoder = Encoder(str(TINY_MODEL / "tokenizer.json"))
    rng = random.Random(9)
    for row in [problem("mmlu", rng, "train") for _ in range(20)] + [drill("mmlu", rng, "train") for _ in range(20)]:
        prompt, answer = encoder([row])[0]
        for letter in re.findall(r"([A-D])\. ", row["solution"]):
            token = encoder.tokenizer.token_to_id(letter)
            assert token in answer and token in prompt


def test_the_committed_weights_find_facts_and_letters_and_others_do_not():
    encoder = Encoder(str(TINY_MODEL / "tokenizer.json"))
    rng = random.Random(10)
    hops, choices = ([problem(name, rng, "validation") for _ in range(20)] for name in ("longbench_hotpotqa", "mmlu"))
    model = load(TINY_MODEL)
    assert min(*lookups(model, encoder, hops), letters(model, encoder, choices)) >= 0.9
    torch.manual_seed(0)
    untrained = TinyLLaDA(model.shape)
    assert max(*lookups(untrained, encoder, hops), letters(untrained, encoder, choices)) < 0.2


def test_a_packed_row_shows_every_masked_place_its_whole_prompt():
    encoder = Encoder(str(TINY_MODEL / "tokenizer.json"))
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


def test_some_documents_are_wholly_masked():
    """Beside those whose t comes near 1: their weight is 1, and that of one of t = 0.5 is 2."""
    encoder = Encoder(str(TINY_MODEL / "tokenizer.json"))
    whole, documents = 0, 0
    for number in range(3):
        batch = make_batch(encoder, number, 16, 1.0, 0)
        weights = batch.loss_weight[(batch.loss_weight > 0) & (batch.loss_source >= 0)]
        at = batch.loss_at[(batch.loss_weight > 0) & (batch.loss_source >= 0)]
        smallest = weights.min()
        documents += len(np.unique(batch.documents[batch.documents >= 0]))
        whole += len(np.unique(batch.documents.flat[at[weights == smallest]]))
    assert 0.5 * WHOLLY_MASKED < whole / documents < 1.7 * WHOLLY_MASKED


def test_of_some_documents_only_digits_are_masked():
    encoder = Encoder(str(TINY_MODEL / "tokenizer.json"))
    rng = random.Random(11)
    (pair,) = encoder([{"source": "gsm8k", "question": "Add 3 and 4.", "solution": "It is 3 + 4 = 7, so 7."}])
    found = []
    for _ in range(400):
        doc = document(encoder, *pair, 0, 1.0, rng)
        if doc.content.any() and np.isin(doc.targets, encoder.digits)[len(pair[0]) :].any():
            found.append(set(doc.targets[doc.masked]) <= set(encoder.digits))
            assert (doc.masked == (doc.weight > 0)).all()
    assert len(found) > 200 and 0.6 * DIGITS_MASKED < np.mean(found) < 1.5 * DIGITS_MASKED


def test_the_first_weights_look_up_what_follows_an_equal_token():
    """Local heads find the places beside; matching heads find a token's like, what followed it, and what came next."""
    model = TinyLLaDA(Shape(vocab_size=500, bos_token_id=0, eos_token_id=1, mask_token_id=2))
    initialise(model, torch.Generator().manual_seed(0))
    tokens = torch.randperm(490, generator=torch.Generator().manual_seed(1))[:120] + 10
    tokens[80:100] = tokens[10:30]
    cos_sin = model.cos_sin[:120]
    bias = torch.zeros(1, 1, 120, 120)
    x = model.transformer["wte"](tokens)[None]
    weights = []
    for block in model.transformer["blocks"][:2]:
        q, k = (proj(block.attn_norm(x)).view(120, 4, 64).transpose(0, 1) for proj in (block.q_proj, block.k_proj))
        weights.append((rotate(q, cos_sin) @ rotate(k, cos_sin).mT / 8).softmax(-1))
        x = block(x, cos_sin[None, None], bias)
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


def smoke(monkeypatch, out, *options):
    """The command, in this process."""
    monkeypatch.setattr(sys, "argv", ["train", "--smoke", "--out", str(out), *options])
    train.main()
    lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    return (out / "model.safetensors").read_bytes(), [(line.get("step"), line.get("loss")) for line in lines]


def test_a_training_that_is_cut_off_goes_on_to_the_same_weights(tmp_path, monkeypatch, capsys):
    """Cut off while it writes the log of its fourth step, after which only the third one's state is there."""
    whole = smoke(monkeypatch, tmp_path / "whole")
    write = Log.write

    def interrupted(log, step, model):
        write(log, step, model)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Log, "write", interrupted)
        smoke(monkeypatch, tmp_path / "cut")
    assert (tmp_path / "cut" / "state.pt").exists()
    with pytest.raises(SystemExit):
        smoke(monkeypatch, tmp_path / "cut", "--seed", "1")
    assert "state.pt is of a training with another seed; remove it" in capsys.readouterr().err
    # as if it had been slow: its time counts
    state = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)
    torch.save(state | {"seconds": state["seconds"] + 1000}, tmp_path / "cut" / "state.pt")
    assert smoke(monkeypatch, tmp_path / "cut") == whole
    last = json.loads((tmp_path / "cut" / "training.jsonl").read_text().splitlines()[-1])
    assert last["seconds"] > 1000
    assert "going on after 3 steps" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*/state*")] == []


def test_a_training_that_is_terminated_keeps_its_last_step(tmp_path, monkeypatch):
    """Which no other rule writes: the next time to would be in an hour."""
    whole = smoke(monkeypatch, tmp_path / "whole")
    write = Log.write

    def terminated(self, step, model):
        write(self, step, model)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="ended after 4 steps by SIGTERM"):
        patch.setattr(Log, "write", terminated)
        patch.setattr(train, "State", lambda out, options, every: State(out, options, every=3600))
        smoke(monkeypatch, tmp_path / "cut")
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["done"] == 4
    assert smoke(monkeypatch, tmp_path / "cut") == whole


COMMAND = [sys.executable, "-m", "evals", "train-tiny", "--smoke", "--steps", "100000", "--rows", "32", "--out"]


def started(tmp_path):
    """A training in a group of its own, as soon as it has begun and its worker is there."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([*COMMAND, str(tmp_path)], cwd=TINY_MODEL.parents[1], start_new_session=True, **pipes)
    assert "parameters on cpu" in process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not (found := children.read_text().split()):
        time.sleep(0.01)
    return process, int(found[0])


def test_sigterm_to_the_whole_group_ends_it(tmp_path):
    """While it waits for the first batch, which the worker makes on."""
    process, _ = started(tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "steps by SIGTERM; the same command goes on from there" in errors, errors


def test_a_worker_that_dies_ends_it_and_is_named(tmp_path):
    process, worker = started(tmp_path)
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "died with exit code -9; the same command goes on from state.pt" in errors


def test_training_runs_from_nothing(tmp_path):
    """The whole path on a CPU: data, tokenizer, steps, export, report; then the engine reads the folder."""
    command = [sys.executable, "-m", "evals", "train-tiny", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=TINY_MODEL.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    options, *lines = map(json.loads, (tmp_path / "training.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines]
    assert len(losses) == 3 and losses[2] < losses[0] < 8.5
    assert options["steps"] == lines[-1]["step"] == 6
    assert all(
        set(line["content"]) == set(SOURCES) and len(line["lookups"]) == 2 and "letters" in line for line in lines
    )
    assert "trained 6 steps" in done.stdout and "n = 4" in done.stdout
    with LLM(str(tmp_path)) as llm:
        (output,) = llm.generate("Tom has 3 apples.", SamplingParams(max_tokens=8), use_tqdm=False)
    assert output.finished
