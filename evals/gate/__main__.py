"""The gate on throughput: is this checkout slower than a commit, or does it take more forwards?

    python -m evals.gate --base origin/main

Exit codes: 0 head passes; 1 a regression; 2 bad usage, or a run that failed; 3 the machine was too unsteady to tell.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.gate.cases import LEAST_PAIRS, PROFILES
from evals.gate.judge import CANNOT_TELL, FAILED, PASSES, REGRESSION, Verdict, exit_code, judge
from evals.gate.measure import ROOT, Measurement, RunFailed, measure, run_command
from evals.gate.worker import SLOWDOWN


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m evals.gate", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--base", required=True, metavar="REF", help="the commit to compare this checkout with")
    add("--margin", type=_percent, default=5.0, help="percent by which head may be slower (5)")
    add("--profile", choices=list(PROFILES), default="full", help="quick: three cases, a minute (full: all ten)")
    add("--pairs", type=_pairs, help=f"measurements of each side per case, {LEAST_PAIRS} at least (quick 40, full 80)")
    add(
        "--accept",
        type=_accepted,
        action="append",
        default=[],
        metavar="nfe=CASE",
        help="let this case take more forwards than base, as intended; may be given again",
    )
    parser.epilog = __doc__.rpartition("\n\n")[2]
    return parser


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"must be a percentage above 0, got {text!r}")
    return value


def _pairs(text: str) -> int:
    if not text.isdecimal() or int(text) < LEAST_PAIRS:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {LEAST_PAIRS}, got {text!r}")
    return int(text)


def _accepted(text: str) -> str:
    what, _, case = text.partition("=")
    if what != "nfe" or not case:
        raise argparse.ArgumentTypeError(f"must be nfe=CASE, got {text!r}")
    return case


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the gate on the checkout `root` and prints what it found. -> the exit code"""
    parser = make_parser()
    options = parser.parse_args(argv)
    profile = PROFILES[options.profile]
    known = [case.id for case in profile.cases]
    for name in options.accept:
        if name not in known:
            # late: the engine takes seconds to import
            from blockinfer.checks import nearest

            hint = nearest(name, known)
            parser.error(
                f"--accept: the profile {options.profile} has no case {name!r}{hint}; it has {', '.join(known)}"
            )
    pairs = options.pairs or profile.pairs
    slowdown = injected_slowdown(parser)
    try:
        found = measure(root, options.base, profile.cases, pairs, slowdown)
    except RunFailed as error:
        print(f"gate: {error}", file=sys.stderr)
        return FAILED
    verdicts = [judge(case, p, options.margin / 100, case.id in options.accept) for case, p in found.pairs.items()]
    print("\n".join(report(found, verdicts, options.margin, pairs, slowdown)))
    return exit_code(verdicts)


def injected_slowdown(parser: argparse.ArgumentParser) -> float:
    text = os.environ.get(SLOWDOWN, "0")
    try:
        slowdown = float(text)
    except ValueError:
        slowdown = math.nan
    if not 0 <= slowdown <= 10:
        parser.error(f"{SLOWDOWN} must be a share from 0 to 10, such as 0.1; got {text!r}")
    return slowdown


def report(found: Measurement, verdicts: Sequence[Verdict], margin: float, pairs: int, slowdown: float) -> list[str]:
    lines = [f"base {found.base}, head {found.head}; {pairs} pairs a case, margin {margin:g} %, {found.seconds:.0f} s"]
    if slowdown:
        lines.append(f"head is slowed down by {100 * slowdown:g} %: {SLOWDOWN} is set")
    if found.model_differs:
        lines.append(f"the small models differ: {', '.join(found.model_differs)}")
    lines.append(f"{'head / base (95 % interval)':<33}{'wall time':<24}{'CPU time':<24}{'NFE':>14}")
    for v in verdicts:
        lines.append(f"{v.case.id:<33}{v.wall!s:<24}{v.cpu!s:<24}{v.nfe[0]:>6} ->{v.nfe[1]:>5}")
    for case, why in found.not_in_base.items():
        lines.append(f"{case.id}: base does not take it, so it is not judged: {why}")
    for v in verdicts:
        lines += [f"{v.case.id}: {text}" for text in v.notes]
        lines += [f"CANNOT TELL {v.case.id}: {text}" for text in v.unclear]
        lines += [f"REGRESSION {v.case.id}: {text}" for text in v.regressions]
    outcome = {
        PASSES: "head passes",
        REGRESSION: "head fails",
        FAILED: "base takes none of the cases: nothing was compared",
        CANNOT_TELL: "this machine was too unsteady to tell",
    }
    return [*lines, outcome[exit_code(verdicts)]]


if __name__ == "__main__":
    run_command(main)
