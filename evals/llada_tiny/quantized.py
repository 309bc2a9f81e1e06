"""What quantization="fp8" costs the small model in right answers: the same fresh problems with it and without.

python -m evals quantized-loss evals/llada_tiny --rows 250 --out /tmp/loss.json # a table, and a file of all grades

The problems are those of `study`, held-out, in exact matches. The model computes in float32, on a GPU if there is one.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product

from tqdm.auto import tqdm

from evals.files import BadOutput, check_output, path_argument, write_measured
from evals.llada_tiny.evaluate import heldout_rows
from evals.llada_tiny.measured import BLOCK_LENGTH, Result, add_options, chosen_modes, loaded, measure
from evals.results.paired import stored

RULES: tuple[dict, ...] = (
    {"unmasking": "low_confidence", "denoising_steps": 32},
    {"unmasking": "threshold", "threshold": 0.9},
)


HEADER = "| mode | rule | right without, % | with | points lost | answers lost, won | McNemar's p |", "| --- " * 7 + "|"


def table_row(before: Result, after: Result) -> str:
    """Of Markdown, for a mode and rule; the bounds of the loss are one-sided, of 95 %."""
    both = after.against(before)
    bounds = f"{100 * both.loss:.1f} ({100 * both.lower():.1f} to {100 * both.upper():.1f})"
    shares = f"{100 * before.accuracy:.1f} | {100 * after.accuracy:.1f}"
    counts = f"{both.lost}, {both.won} | {both.mcnemar():.2f}"
    return f"| `{after.mode}` | {after.rule} | {shares} | {bounds} | {counts} |"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m evals quantized-loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--out", type=path_argument, help="a .json file for every grade (none)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    modes = chosen_modes(parser, args)
    try:
        if args.out:
            check_output(args.out, [])
    except BadOutput as error:
        parser.error(f"--out: {error}")
    rows = heldout_rows(args.rows, "heldout", args.seed)
    cells = list(product(modes, RULES))
    with loaded(parser, args.folder, max_num_seqs=args.max_num_seqs) as llm:
        bar = tqdm(cells, "without fp8", dynamic_ncols=True)
        plain = [measure(llm, rows, mode, BLOCK_LENGTH, rule, {}) for mode, rule in bar]
    print(*HEADER, sep="\n", flush=True)
    quantized = []
    with loaded(parser, args.folder, quantization="fp8", max_num_seqs=args.max_num_seqs) as llm:
        for before, (mode, rule) in zip(plain, cells, strict=True):
            quantized.append(measure(llm, rows, mode, BLOCK_LENGTH, rule, {}))
            print(table_row(before, quantized[-1]), flush=True)
    if args.out:
        pairs = [
            {"quantized": asdict(after), "plain": asdict(before)} | stored(after.against(before))
            for before, after in zip(plain, quantized, strict=True)
        ]
        try:
            write_measured(args.out, json.dumps(pairs))
        except BadOutput as error:
            parser.error(f"--out: {error}")
