"""How often the gate alarms: it is run again and again on one commit, base and head the same but for a known slowdown.

    python -m evals gate-experiment --runs 20 --slowdown 0,0.05,0.1 --profile quick --output gate_experiment.jsonl

A slowdown may have a place: 0.05:vanilla sits in one mode, 0.05:threshold in one rule; 0.05:memory is no slowdown, but
memory that head takes beyond base's. Every run starts both sides anew. Its result is appended to the output file at
once, and the same command, given again, makes the runs that are still missing and prints the table. Exit codes: 0 done,
2 bad usage or a run that failed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.files import number_argument
from evals.gate.cases import PROFILES, Worse
from evals.gate.checkout import RunFailed, short
from evals.gate.exits import FAILED
from evals.gate.judge import Margins, exit_code, judge
from evals.gate.measure import ROOT, measure
from evals.gate.outcomes import SAME, Case, Run, read_runs, table

MARGINS = Margins()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m evals gate-experiment", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--runs",
        type=number_argument(1),
        default=20,
        help="runs with each slowdown, those in the output file included (20)",
    )
    slowdowns = [Worse(), Worse(0.05), Worse(0.1)]
    add("--slowdown", type=_slowdowns, default=slowdowns, help="shares of head's work, a comma list (0,0.05,0.1)")
    add("--profile", choices=list(PROFILES), default="quick", help="as of the gate (quick)")
    add("--output", default="gate_experiment.jsonl", help="where each run is appended (gate_experiment.jsonl)")
    return parser


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    options = make_parser().parse_args(argv)
    profile = PROFILES[options.profile]
    path = Path(options.output)
    try:
        known = (short(root), options.profile, profile.pairs, MARGINS.time, MARGINS.memory)
        about = dict(zip(SAME, known, strict=True))
        if about["commit"].endswith("+"):
            raise RunFailed("the checkout has changes, so head would not be the same as base: commit or stash them")
        # before the first run, not after it
        path.open("a").close()
        runs = read_runs(path, about)
        for _ in range(options.runs):
            # in turn, so that drift over the hours affects every slowdown
            for worse in options.slowdown:
                if sum(run.worse == worse for run in runs) < options.runs:
                    runs.append(_run(root, about, worse))
                    with path.open("a", encoding="utf-8") as file:
                        file.write(runs[-1].model_dump_json() + "\n")
                    print(runs[-1], flush=True)
    except (RunFailed, OSError) as error:
        print(f"experiment: {error}", file=sys.stderr)
        return FAILED
    print("\n".join(table(runs)))
    return 0


def _slowdowns(text: str) -> list[Worse]:
    try:
        return [Worse.parse(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _run(root: Path, about: dict[str, Any], worse: Worse) -> Run:
    found = measure(root, "HEAD", PROFILES[about["profile"]].cases, about["pairs"], worse)
    if {found.base, found.head} != {about["commit"]}:
        raise RunFailed(f"the checkout is no longer at {about['commit']}: go on from there, or with another --output")
    verdicts, held = judge(found, MARGINS)
    return Run(
        **about,
        slowdown=worse.share,
        where=worse.where,
        exit_code=exit_code(verdicts, held),
        seconds=round(found.seconds, 1),
        held=found.held,
        cases={verdict.case.id: Case.of(verdict, worse, MARGINS) for verdict in verdicts},
    )
