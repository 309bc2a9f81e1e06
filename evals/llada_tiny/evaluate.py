"""Accuracy of a model by two plain, uncached decoders; nothing here is shared with the engine.

python -m evals evaluate-tiny evals/llada_tiny --rows 100
"""

import argparse
import random
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from blockinfer.checks import foreign_errors
from evals.files import number_argument, path_argument
from evals.llada_tiny.data import Encoder
from evals.llada_tiny.model import TinyLLaDA, attention_bias, load
from evals.llada_tiny.problems import SOURCES, problem
from evals.llada_tiny.problems.split import SPLITS

MODES = ("vanilla", "block", "block_uncached")
MAX_TOKENS = 128
BATCH = 256  # problems decoded at a time


@torch.no_grad()
def decode(
    model: TinyLLaDA,
    prompts: list[list[int]],
    encoder: Encoder,
    mode: str,
    block_length: int = 32,
    steps: int | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy decoding of MAX_TOKENS. Returns tokens [B, MAX_TOKENS] and forwards [B].

    vanilla: the whole canvas is seen. block_uncached: the masked suffix is absent. block: the same, and the prompt and
    every finished block see nothing after themselves, as with a K/V cache that is never refreshed. Each step reveals
    the most confident places of the block: block_length / steps of them, or all >= threshold.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    size = width + MAX_TOKENS
    tokens = torch.full((len(prompts), size), encoder.mask, device=device)
    documents = torch.zeros(len(prompts), size, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):  # aligned to the right, so that canvases share their columns
        tokens[row, width - len(prompt) : width] = torch.tensor(prompt, device=device)
        documents[row, : width - len(prompt)] = -1
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    column = torch.arange(size, device=device)
    positions = (column - width + lengths).clamp(min=0)
    stairs = torch.where(column < width, 0, (column - width) // block_length + 1)
    segments = (stairs if mode == "block" else torch.zeros_like(stairs)).expand_as(tokens)
    per_step = max(1, block_length // (steps or block_length))
    forwards = torch.zeros(len(prompts), dtype=torch.long, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for start in range(width, size, block_length):
        end = start + block_length
        seen = size if mode == "vanilla" else end
        bias = attention_bias(documents[:, :seen], segments[:, :seen])
        masked = torch.ones(len(prompts), block_length, dtype=torch.bool, device=device)
        while True:
            active = masked.any(1) & ~done
            if not active.any():
                break
            forwards += active
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hidden = model.hidden(tokens[:, :seen], positions[:, :seen], bias)[:, start:end]
            logits = torch.nn.functional.linear(hidden.float(), model.transformer["wte"].weight.float())
            logits[..., encoder.mask] = float("-inf")
            confidence, best = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(~masked, -1.0)
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            reveal = masked & (rank < (per_step if threshold is None else 1))
            if threshold is not None:
                reveal |= masked & (confidence >= threshold)
            reveal &= active[:, None]
            tokens[:, start:end] = torch.where(reveal, best, tokens[:, start:end])
            masked &= ~reveal
        block = tokens[:, start:end]
        done |= ((block == encoder.eot) | (block == encoder.eos)).any(1)
    return tokens[:, width:], forwards


def final_answer(source: str, text: str) -> str | None:
    """The answer that a solution text gives."""
    pattern = r"\\boxed\{([^{}]*)\}" if source == "math500" else r"The answer is (.+?)\.(?:\s|$)"
    found = re.findall(pattern, text)
    return found[-1] if found else None


def heldout_rows(count: int, split: str, seed: int = 7) -> list[dict]:
    """`count` fresh problems of each source, interleaved."""
    rng = random.Random(seed)
    return [problem(source, rng, split) for _ in range(count) for source in SOURCES]


def evaluate(model: TinyLLaDA, encoder: Encoder, rows: list[dict], mode: str, **options: float) -> dict[str, float]:
    """Accuracy by source and in all, and tokens per forward over gsm8k and math500."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].get("context", "")))  # less padding
    right: dict[str, list[bool]] = {source: [] for source in SOURCES}
    emitted = spent = 0
    for first in range(0, len(rows), BATCH):
        part = [rows[i] for i in order[first : first + BATCH]]
        tokens, forwards = decode(model, [prompt for prompt, _ in encoder(part)], encoder, mode, **options)
        for row, ids, nfe in zip(part, tokens.tolist(), forwards.tolist(), strict=True):
            length = next((i for i, token in enumerate(ids) if token in (encoder.eot, encoder.eos)), len(ids))
            text = encoder.tokenizer.decode(ids[:length])
            right[row["source"]].append(final_answer(row["source"], text) == row["answer"])
            if row["source"] in ("gsm8k", "math500"):
                emitted, spent = emitted + length, spent + nfe
    result = {source: sum(hits) / max(1, len(hits)) for source, hits in right.items()}
    result["all"] = sum(map(sum, right.values())) / len(rows)
    result["tokens_per_forward"] = emitted / max(1, spent)
    return result


@torch.no_grad()
def _most_likely(model: TinyLLaDA, encoder: Encoder, pairs: list[tuple[list[int], list[int]]]) -> list[list[int]]:
    """The most likely tokens of the canvases, each after its prompt, by one forward. Canvases have one length."""
    size = len(pairs[0][1])
    width = max(len(prompt) for prompt, _ in pairs)
    device = next(model.parameters()).device
    tokens = torch.full((len(pairs), width + size), encoder.eos)
    documents = torch.zeros_like(tokens)
    for row, (prompt, canvas) in enumerate(pairs):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt + canvas)
        documents[row, : width - len(prompt)] = -1
    documents = documents.to(device)
    positions = (documents + 1).cumsum(1).sub(1).clamp(min=0)
    bias = attention_bias(documents, torch.zeros_like(documents))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.hidden(tokens.to(device), positions, bias)[:, width:]
    return model.logits(hidden.float()).argmax(-1).tolist()


def lookups(model: TinyLLaDA, encoder: Encoder, rows: list[dict]) -> tuple[float, float]:
    """Shares of two-hop rows whose first fact, and whose second given the first, is most likely at every token.

    All of a block of 32 is masked, then the first fact is given. A fact ends with its full stop.
    """
    stop = encoder.tokenizer.token_to_id(".")
    pairs = encoder(rows)
    ends = [[i + 1 for i, token in enumerate(answer) if token == stop] for _, answer in pairs]
    found = []
    for hop in range(2):
        given = [answer[: end[0] * hop] for (_, answer), end in zip(pairs, ends, strict=True)]
        canvases = [part + [encoder.mask] * (32 - len(part)) for part in given]
        best = _most_likely(model, encoder, [(p, canvas) for (p, _), canvas in zip(pairs, canvases, strict=True)])
        spans = [slice(end[0] * hop, end[hop]) for end in ends]
        right = [b[span] == answer[span] for b, span, (_, answer) in zip(best, spans, pairs, strict=True)]
        found.append(sum(right) / len(rows))
    return found[0], found[1]


def letters(model: TinyLLaDA, encoder: Encoder, rows: list[dict]) -> float:
    """Share of four-choice rows whose letter is most likely when the rest of the answer is given."""
    pairs, hidden = [], []
    for row, (prompt, answer) in zip(rows, encoder(rows), strict=True):
        before = row["solution"].partition("The answer is ")
        place = len(encoder.tokenizer.encode("".join(before[:2]), add_special_tokens=False).ids)
        canvas = (answer + [encoder.eos] * 64)[:64]
        hidden.append((place, canvas[place]))
        canvas[place] = encoder.mask
        pairs.append((prompt, canvas))
    best = _most_likely(model, encoder, pairs)
    return sum(tokens[place] == letter for tokens, (place, letter) in zip(best, hidden, strict=True)) / len(rows)


QUICK: list[tuple[str, dict]] = [("vanilla", {"threshold": 0.9}), ("block", {"threshold": 0.9})]
SETTINGS: list[tuple[str, dict]] = [
    *((mode, {}) for mode in MODES),
    *[("block", {"threshold": 0.9}), ("block", {"steps": 8}), ("block", {"steps": 4})],
]


def report(model: TinyLLaDA, encoder: Encoder, rows: list[dict], settings: list[tuple[str, dict]]) -> None:
    """Print the table of modes and rules."""
    print(f"n = {len(rows)}", *SOURCES, "all", "tokens/forward", sep="  ")
    for mode, options in settings:
        result = evaluate(model, encoder, rows, mode, **options)
        name = " ".join([mode, *(f"{key}={value}" for key, value in options.items())])
        print(f"{name:22}", *(f"{value:.3f}" for value in result.values()), sep="  ", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m evals evaluate-tiny", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=path_argument, help="the small model's")
    parser.add_argument("--rows", type=number_argument(1), default=250, help="problems a source (250)")
    parser.add_argument("--split", choices=SPLITS, default="heldout", help="whose problems (heldout)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with foreign_errors(f"{args.folder} holds no small model"):
            model, encoder = load(args.folder).to(device), Encoder(str(args.folder / "tokenizer.json"))
    except ValueError as error:
        parser.error(str(error))
    report(model, encoder, heldout_rows(args.rows, args.split), SETTINGS)
