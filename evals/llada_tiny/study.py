"""Accuracy against tokens per forward, of every mode with every rule, by the engine: two tables and one drawing.

python -m evals study evals/llada_tiny --rows 250 --out /tmp/study # writes study.md, .svg and .json
python -m evals study evals/llada_tiny --mode vanilla --out /tmp/one        # a part, on another GPU, say,
python -m evals study evals/llada_tiny --mode block --add /tmp/one/study.json --out /tmp/both # is added
python -m evals study evals/llada_tiny --several-blocks --block-length 8,16,32 --out /tmp/blocks # no drawing

The problems are fresh ones of the held-out split, exact matches count, and tokens end before the stop token. The model
computes in float32, on a GPU if there is one.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path
from xml.sax.saxutils import escape

from pydantic import TypeAdapter
from pydantic_core import from_json

from blockinfer.decoding.modes import MODES
from evals.files import BadOutput, check_folder, check_output, path_argument, read_bytes, write_measured
from evals.llada_tiny import several_blocks
from evals.llada_tiny.evaluate import heldout_rows
from evals.llada_tiny.measured import (
    BLOCK_LENGTH,
    Result,
    add_options,
    chosen_modes,
    label,
    loaded,
    measure,
    table_row,
    window_label,
)
from evals.llada_tiny.problems import SOURCES
from evals.report.scales import Scale, around
from evals.results.paired import Paired
from evals.runs.resume import fingerprint

RULES: tuple[dict, ...] = (
    *({"unmasking": "low_confidence", "denoising_steps": steps} for steps in (32, 16, 8, 4)),
    *({"unmasking": "threshold", "threshold": value} for value in (0.7, 0.9, 0.95)),
    {"unmasking": "factor", "factor": 1.0},
    {"unmasking": "entropy", "entropy_bound": 0.15},
)
Part = tuple[str, int]
_EXAMPLES = [(mode, BLOCK_LENGTH) for mode in MODES]  # what distinguishes two plans
Plan = Callable[[str, int], list[tuple[dict, dict]]]
COLOURS = ("#1b6ca8", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be123c")


def one_block(mode: str, block_length: int) -> list[tuple[dict, dict]]:
    """Every rule, with one block at a time."""
    return [(rule, {}) for rule in RULES]


def configurations(plan: Plan, parts: list[Part]) -> list[tuple[str, int, dict, dict]]:
    """What `plan` measures for these modes and block lengths."""
    return [(*part, *options) for part in parts for options in plan(*part)]


def parts_of(results: list[Result]) -> list[Part]:
    """Modes and block lengths, in order of first appearance."""
    return list(dict.fromkeys((r.mode, r.block_length) for r in results))


def modes_of(results: list[Result]) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(r.mode for r in results))


def summary(results: list[Result]) -> str:
    """The table of rules by modes: right answers in per cent, and tokens per forward of all answers."""
    modes = modes_of(results)
    found = {(r.mode, r.rule): f"{100 * r.accuracy:.1f}, {r.tokens_per_forward:.2f}" for r in results}
    lines = [table_row(["rule", *(f"`{mode}`" for mode in modes)]), table_row(["---"] * (len(modes) + 1))]
    for rule in dict.fromkeys(r.rule for r in results):
        lines.append(table_row([rule, *(found.get((mode, rule), "") for mode in modes)]))
    return "\n".join(lines) + "\n"


def document(results: list[Result], rows: int) -> str:
    """study.md: what each table says, and both."""
    head = f"Right answers in per cent, and tokens per forward, {rows} held-out problems of each source."
    return f"{head}\n\n{summary(results)}\n{markdown(results, rows)}"


def markdown(results: list[Result], rows: int) -> str:
    """The table by sources, in per cent, and what each mode and rule loses against the first of each, in points."""
    first = results[0]
    head = ["mode", "rule", *(f"`{source}`" for source in SOURCES), "all", "tokens per forward", "of the first two"]
    head += [f"against `{first.mode}`, same rule", f"against {first.rule}, same mode"]
    lines = [
        f"By source, {rows} problems each. Against another on the same rows: points lost, and how many answers were "
        "lost and won.",
        "",
        table_row(head),
        table_row(["---"] * len(head)),
    ]
    for r in results:
        shares = [*(r.share(source) for source in SOURCES), r.accuracy]
        speeds = [f"{r.tokens_per_forward:.2f}", f"{r.long_tokens_per_forward:.2f}"]
        others = [
            next((_loss(r.against(o)) for o in results if (o.mode, o.rule) == key and o is not r), "")
            for key in ((first.mode, r.rule), (r.mode, first.rule))
        ]
        lines.append(table_row([f"`{r.mode}`", r.rule, *(f"{100 * x:.1f}" for x in shares), *speeds, *others]))
    return "\n".join(lines) + "\n"


def _loss(paired: Paired) -> str:
    return f"{100 * paired.loss:.1f} ({paired.lost}, {paired.won})"


def svg(results: list[Result]) -> str:
    """Accuracy over tokens per forward, the latter logarithmic; one colour a mode.

    The rule stands beside the first mode's mark, higher if another one is there; for low_confidence only the steps.
    """
    width, height = 760, 440
    speeds = [r.tokens_per_forward for r in results]
    shares = [r.accuracy for r in results]
    x = Scale(*around(speeds, True, room=0.1), 60, width - 130, True)
    y = Scale(*around(shares, False, room=0.02, most=1.0), height - 50, 20)
    modes = modes_of(results)
    colours = {mode: COLOURS[i % len(COLOURS)] for i, mode in enumerate(modes)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M60 20V{height - 50}H{width - 130}" fill="none" stroke="#444"/>',
        _text((60 + width - 130) / 2, height - 14, "tokens per forward", "middle"),
        _text(60, 12, "right answers, per cent", "start"),
    ]
    parts += [_text(x(v), height - 34, f"{v:g}", "middle") for v in x.ticks(6)]
    parts += [_text(54, y(v) + 4, f"{100 * v:.4g}", "end") for v in y.ticks(7)]
    labels: list[tuple[float, float, str]] = []
    for r in results:
        at = x(r.tokens_per_forward), y(r.accuracy)
        about = escape(f"{r.mode}, {r.rule}: {100 * r.accuracy:.1f} %, {r.tokens_per_forward:.2f} tokens per forward")
        parts.append(
            f'<circle cx="{at[0]}" cy="{at[1]}" r="4" fill="{colours[r.mode]}" fill-opacity=".7">'
            f"<title>{about}</title></circle>"
        )
        if r.mode == modes[0]:
            labels.append((at[0] + 6, at[1] - 5, r.rule.removeprefix("low_confidence ")))
    lines: list[tuple[float, float]] = []
    for left, baseline, text in labels:
        while any(abs(left - other) < 90 and abs(baseline - line) < 12 for other, line in lines):
            baseline -= 1
        lines.append((left, baseline))
        parts.append(_text(left, baseline, text, "start"))
    for i, mode in enumerate(modes):
        line = height - 60 - 18 * (len(modes) - 1 - i)
        parts.append(f'<circle cx="76" cy="{line}" r="4" fill="{colours[mode]}"/>')
        parts.append(_text(86, line + 4, mode, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="#222">{escape(text)}</text>'


def read(path: Path, about: dict, plan: Plan) -> list[Result]:
    """Reads another study.

    Raises ValueError if it is not one or not whole, or of another model, machine or engine, or of other rules or
    problems.
    """
    try:
        kept = from_json(read_bytes(path))
        results = TypeAdapter(list[Result]).validate_python(kept["results"])
        other = [name for name in about if about[name] != kept["about"][name]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the study.json of a study ({' '.join(str(error).split()):.200})") from error
    if other:
        raise ValueError(f"{path} is of another {' and other '.join(other)} than this study")
    planned = [
        (m, n, label(rule), window_label(window)) for m, n, rule, window in configurations(plan, parts_of(results))
    ]
    if [r.configuration for r in results] != planned:
        raise ValueError(f"{path} is of a study that was cut off, or lacks rules of a mode; make it anew")
    return results


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m evals study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--block-length", default=str(BLOCK_LENGTH), help=f"a comma list with --several-blocks ({BLOCK_LENGTH})"
    )
    several = "a few rules with one block at a time and with several open, instead of every rule with one"
    parser.add_argument("--several-blocks", action="store_true", help=several)
    parser.add_argument(
        "--add", type=path_argument, nargs="+", default=[], help="study.json of other modes, put before"
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder for study.md, .svg and .json")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    modes = chosen_modes(parser, args)
    lengths = _lengths(parser, args.block_length, args.several_blocks)
    plan, parts = several_blocks.plan if args.several_blocks else one_block, list(product(modes, lengths))
    rows = heldout_rows(args.rows, "heldout", args.seed)
    document_file, drawing_file, kept_file = (args.out / f"study.{kind}" for kind in ("md", "svg", "json"))
    files = [document_file, kept_file] + [drawing_file] * (not args.several_blocks)
    try:
        check_folder(args.out)
        for path in files:
            check_output(path, args.add)
    except BadOutput as error:
        parser.error(f"--out: {error}")
    with loaded(parser, args.folder, max_num_seqs=args.max_num_seqs) as llm:
        labels = [f"{label(rule)}, {window_label(window)}" for *_, rule, window in configurations(plan, _EXAMPLES)]
        about = {"model": fingerprint(llm), "rows": args.rows, "seed": args.seed, "rules": labels}
        if not args.several_blocks:
            about["block length"] = lengths[0]
        try:
            added = [read(path, about, plan) for path in args.add]
            named = [*parts, *chain(*map(parts_of, added))]
            if again := {f"{mode} at {length}" for mode, length in named if named.count((mode, length)) > 1}:
                raise ValueError(f"{', '.join(sorted(again))} would be there twice, of --mode and the files together")
        except (OSError, ValueError) as error:
            parser.error(f"--add: {error}")
        results = list(chain(*added))
        for configuration in configurations(plan, parts):
            results.append(r := measure(llm, rows, *configuration))
            name = " ".join(map(str, r.configuration if args.several_blocks else (r.mode, r.rule)))
            print(f"{name}: {r.accuracy:.3f}, {r.tokens_per_forward:.2f} tokens a forward", flush=True)
            kept = {"about": about, "results": [asdict(result) for result in results]}
            failures = _write({kept_file: json.dumps(kept)})
    text = (several_blocks.document if args.several_blocks else document)(results, args.rows)
    failures += _write({document_file: text} | ({} if args.several_blocks else {drawing_file: svg(results)}))
    if failures:
        print(text)
        sys.exit("study: " + "; ".join(failures))


def _lengths(parser: argparse.ArgumentParser, given: str, several: bool) -> list[int]:
    texts = given.split(",")
    if not all(text.isdecimal() and int(text) for text in texts) or len(set(texts)) < len(texts):
        parser.error(f"--block-length must be numbers of positions, a comma list, each once, got {given!r}")
    if len(texts) > 1 and not several:
        parser.error(f"--block-length: only --several-blocks takes more than one, got {given}")
    return list(map(int, texts))


def _write(contents: dict[Path, str]) -> list[str]:
    """Writes each file separately -> what could not be written."""
    failures = []
    for path, content in contents.items():
        try:
            write_measured(path, content)
        except BadOutput as error:
            failures.append(str(error))
    return failures
