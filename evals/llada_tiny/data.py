"""Training batches: problems as canvases in LLaDA's and the decoder's own forms, packed into rows of 512 tokens.

All randomness is drawn here, from the batch's number and the seed alone, so that a run can be repeated with any number
of worker processes.
"""

import random
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from evals.llada_tiny.problems import DRILLS, SOURCES, drill, problem
from evals.llada_tiny.tokenizer import EOS, EOT, MASK, chat_text

ROW = 512  # tokens in a packed row; the longest prompt with its canvas fits
# At the curriculum's beginning and end: shares of gsm8k, math500, mmlu, longbench_hotpotqa by documents, and the share
# of drills in look-ups among the sources that have them.
MIXTURES = ((0.15, 0.15, 0.35, 0.35), (0.34, 0.26, 0.24, 0.16))
DRILL_SHARES = (0.4, 0.05)
FORMS = ("whole", "cut", "block", "staircase", "suffix")
FORM_SHARES = (0.2, 0.1, 0.15, 0.4, 0.15)
LOWEST_T = 0.02
# The share of documents with everything masked, as at every block's beginning, where a confidence rule reveals most.
# A t uniform in (0, 1), as most documents have, hardly ever comes near this.
WHOLLY_MASKED = 0.15
# The share of documents with only digits masked and the words between them given, as a confidence rule leaves a worked
# answer. Uniform t hardly ever gives this, and results are then stated before their operands.
DIGITS_MASKED = 0.15
PADDING_WEIGHT = 0.1  # the weight of the stop tokens after the first, which are easy and many
RECIPE = {
    "mixtures": MIXTURES,
    "drill_shares": DRILL_SHARES,
    "form_shares": FORM_SHARES,
    "lowest_t": LOWEST_T,
    "wholly_masked": WHOLLY_MASKED,
    "digits_masked": DIGITS_MASKED,
    "padding_weight": PADDING_WEIGHT,
}


@dataclass
class Batch:
    """One step's arrays, [rows, ROW] but for `loss_at`, `loss_weight` and `loss_source` [places]."""

    tokens: np.ndarray  # the model's input
    targets: np.ndarray  # [places]: the token behind each masked place
    positions: np.ndarray
    documents: np.ndarray  # -1 where a row is not filled
    segments: np.ndarray  # a document's attention staircase: see attention_bias
    loss_at: np.ndarray  # flat indices of masked places, padded with 0
    loss_weight: np.ndarray  # weight / t, already divided by the batch's total weight; 0 where padded
    loss_source: np.ndarray  # index of the source; -1 for padding and for stop tokens after the first


@dataclass
class Document:
    """One problem in one form. Arrays of one length, the prompt's and the canvas's tokens."""

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    weight: np.ndarray  # of a place among the maskable ones; 0 for given ones
    masked: np.ndarray
    t: float
    source: int
    content: np.ndarray  # places that hold the answer or its first stop token


class Encoder:
    """Rows to token ids with the fast tokenizer."""

    def __init__(self, path: str) -> None:
        self.tokenizer = Tokenizer.from_file(path)
        self.eos, self.eot, self.mask = (self.tokenizer.token_to_id(token) for token in (EOS, EOT, MASK))
        self.digits = [self.tokenizer.token_to_id(digit) for digit in "0123456789"]

    def __call__(self, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids ending with the stop token) of each row."""
        prompts = self.tokenizer.encode_batch([chat_text(row) for row in rows], add_special_tokens=False)
        answers = self.tokenizer.encode_batch([row["solution"] for row in rows], add_special_tokens=False)
        return [(p.ids, [*a.ids, self.eot]) for p, a in zip(prompts, answers, strict=True)]


def document(
    encoder: Encoder, prompt: list[int], answer: list[int], source: int, t: float, rng: random.Random
) -> Document:
    """Lay out prompt and canvas in a form drawn by `rng`, mask the maskable places with probability t."""
    form = rng.choices(FORMS, FORM_SHARES)[0]
    only_digits = rng.random() < DIGITS_MASKED
    n = len(answer)
    start, stop = 0, 0  # the maskable part of the canvas
    if form in ("whole", "cut"):
        long = [c for c in (32, 64, 96, 128, 160) if c >= n]
        size = rng.choice(long) if rng.random() < 0.6 else rng.randint(max(32, n), 160)
        if form == "cut" and n > 8:
            size = rng.randrange(8, n) if rng.random() < 0.5 or n <= 32 else rng.randrange(32, n, 32)
        stop = size
    else:
        length = 32 if rng.random() < 0.6 else rng.choice((8, 16, 64))
        start = rng.randrange((n + length - 1) // length) * length
        stop = start + length
        size = max(stop, 128 if rng.random() < 0.6 else rng.randint(stop, 160)) if form == "suffix" else stop
    canvas = (answer + [encoder.eos] * size)[:size]
    p = len(prompt)
    targets = np.array(prompt + canvas, dtype=np.int64)
    where = np.arange(p + size) - p
    maskable = (where >= start) & (where < stop)
    if only_digits and (digits := maskable & np.isin(targets, encoder.digits)).any():
        maskable = digits
    drawn = np.random.default_rng(rng.getrandbits(64)).random(p + size)
    masked = maskable & (drawn < t)
    tokens = np.where(masked | (where >= stop), encoder.mask, targets)
    segments = np.zeros(p + size, dtype=np.int64)
    if form == "staircase":
        segments = np.where(where < 0, 0, where // (stop - start) + 1)
    content = maskable & (where < n)
    weight = np.where(content, 1.0, PADDING_WEIGHT) * maskable
    return Document(tokens, targets, segments, weight, masked, t, source, content)


def _row(source: str, rng: random.Random, level: float) -> dict:
    if source in DRILLS and rng.random() < DRILL_SHARES[0] + level * (DRILL_SHARES[1] - DRILL_SHARES[0]):
        return drill(source, rng, "train", level)
    return problem(source, rng, "train", level)


def make_batch(encoder: Encoder, number: int, rows: int, level: float, seed: int) -> Batch:
    """Batch `number` of a run: `rows` packed rows of training problems, t stratified over (0, 1)."""
    rng = random.Random(f"{seed}/train/{number}")
    space = [ROW] * rows
    placed: list[tuple[int, int, Document]] = []
    mixture = [first + level * (last - first) for first, last in zip(*MIXTURES, strict=True)]
    while True:
        group = [_row(source, rng, level) for source in rng.choices(SOURCES, mixture, k=64)]
        offset = rng.random()
        rates = [(i + offset) / 64 if rng.random() >= WHOLLY_MASKED else 1.0 for i in range(64)]
        rng.shuffle(rates)
        full = False
        for row, (prompt, answer), rate in zip(group, encoder(group), rates, strict=True):
            source = SOURCES.index(row["source"])
            doc = document(encoder, prompt, answer, source, max(LOWEST_T, rate), rng)
            at = next((r for r in range(rows) if space[r] >= len(doc.tokens)), None)
            if at is None:
                full = True
                break
            placed.append((at, ROW - space[at], doc))
            space[at] -= len(doc.tokens)
        if full:
            return _pack(encoder, placed, rows)


def _pack(encoder: Encoder, placed: list[tuple[int, int, Document]], rows: int) -> Batch:
    tokens = np.full((rows, ROW), encoder.eos, dtype=np.int16)
    targets = np.zeros((rows, ROW), dtype=np.int16)
    positions = np.zeros((rows, ROW), dtype=np.int16)
    documents = np.full((rows, ROW), -1, dtype=np.int16)
    segments = np.zeros((rows, ROW), dtype=np.int16)
    weight = np.zeros((rows, ROW), dtype=np.float32)
    source = np.full((rows, ROW), -1, dtype=np.int8)
    total = 0.0
    for number, (row, column, doc) in enumerate(placed):
        span = (row, slice(column, column + len(doc.tokens)))
        tokens[span], targets[span], segments[span] = doc.tokens, doc.targets, doc.segments
        positions[span], documents[span] = np.arange(len(doc.tokens)), number
        weight[span] = doc.weight * doc.masked / doc.t
        source[span] = np.where(doc.content, doc.source, -1)
        total += float(doc.weight.sum())
    places = rows * ROW // 4
    at = np.flatnonzero(weight)[:places]
    loss_at, loss_weight = np.zeros(places, dtype=np.int32), np.zeros(places, dtype=np.float32)
    loss_source, wanted = np.full(places, -1, dtype=np.int8), np.zeros(places, dtype=np.int16)
    loss_at[: len(at)], loss_weight[: len(at)] = at, weight.flat[at] / total
    loss_source[: len(at)], wanted[: len(at)] = source.flat[at], targets.flat[at]
    return Batch(tokens, wanted, positions, documents, segments, loss_at, loss_weight, loss_source)
