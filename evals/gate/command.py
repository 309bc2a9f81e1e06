"""The gate: is this checkout slower than a commit, or does it take more forwards or more memory?

    python -m evals gate --base origin/main

Exit codes: 0 head passes; 1 a regression; 2 bad usage, or a run that failed; 3 the machine was too unsteady to tell.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.files import number_argument
from evals.gate.cases import LEAST_PAIRS, PROFILES, Worse
from evals.gate.checkout import RunFailed
from evals.gate.exits import CANNOT_TELL, FAILED, PASSES, REGRESSION
from evals.gate.judge import Margins, Verdict, exit_code, judge, megabytes
from evals.gate.measure import ROOT, Measurement, measure

SLOWDOWN = "BLOCKINFER_GATE_SLOWDOWN"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m evals gate", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--base", required=True, type=_ref, metavar="REF", help="the commit to compare this checkout with")
    time, memory = 100 * Margins.time, 100 * Margins.memory
    add("--margin", type=_percent, default=time, help=f"percent by which head may be slower ({time:g})")
    add("--memory-margin", type=_percent, default=memory, help=f"and by which its tensors may be larger ({memory:g})")
    add("--profile", choices=list(PROFILES), default="full", help="quick: seven cases, two minutes (full: twelve)")
    add(
        "--pairs",
        type=number_argument(LEAST_PAIRS),
        help=f"measurements of each side per case, {LEAST_PAIRS} at least (quick 60, full 80)",
    )
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


def _ref(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must name a commit, got '': is a variable of the shell unset?")
    return text


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"must be a percentage above 0, got {text!r}")
    return value


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
    try:
        worse = Worse.parse(os.environ.get(SLOWDOWN, "0"))
    except ValueError as error:
        parser.error(f"{SLOWDOWN} {error}")
    try:
        found = measure(root, options.base, profile.cases, pairs, worse)
    except (RunFailed, OSError) as error:
        print(f"gate: {error}", file=sys.stderr)
        return FAILED
    margins = Margins(options.margin / 100, options.memory_margin / 100)
    verdicts, held = judge(found, margins, options.accept)
    print("\n".join(report(found, verdicts, held, margins, pairs, worse)))
    return exit_code(verdicts, held)


def report(
    found: Measurement, verdicts: Sequence[Verdict], held: str | None, margins: Margins, pairs: int, worse: Worse
) -> list[str]:
    margin = f"margin {100 * margins.time:g} %, of memory {100 * margins.memory:g} %"
    lines = [f"base {found.base}, head {found.head}; {pairs} pairs a case, {margin}, {found.seconds:.0f} s"]
    if worse.share:
        lines.append(f"head is made worse by {worse}: {SLOWDOWN} is set")
    if found.model_differs:
        lines.append(f"the small models differ: {', '.join(found.model_differs)}")
    head = f"{'head / base (90 % interval)':<33}{'wall time':<22}{'CPU time':<22}{'NFE':>14}{'MB a unit':>17}"
    lines.append(head)
    for v in verdicts:
        peaks = "{:>8} ->{:>6}".format(*map(megabytes, v.peaks))
        lines.append(f"{v.case.id:<33}{v.wall!s:<22}{v.cpu!s:<22}{v.nfe[0]:>6} ->{v.nfe[1]:>5}{peaks}")
    lines.append("MB between units: {} -> {}".format(*map(megabytes, found.held)))
    for case, why in found.not_in_base.items():
        lines.append(f"{case.id}: base does not take it, so it is not judged: {why}")
    for v in verdicts:
        lines += [f"{v.case.id}: {text}" for text in v.notes]
        lines += [f"CANNOT TELL {v.case.id}: {text}" for text in v.unclear]
        lines += [f"REGRESSION {v.case.id}: {text}" for text in v.regressions]
    lines += [f"REGRESSION: {held}"] if held else []
    outcome = {
        PASSES: "head passes",
        REGRESSION: "head fails",
        FAILED: "base takes none of the cases: nothing was compared",
        CANNOT_TELL: "this machine was too unsteady to tell",
    }
    return [*lines, outcome[exit_code(verdicts, held)]]
