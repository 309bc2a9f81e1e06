"""How often the gate alarms: it is run again and again on one commit, base and head the same but for a known slowdown.

    python -m evals.gate.experiment --runs 20 --slowdown 0,0.05,0.1 --profile quick --output gate_experiment.jsonl

Every run starts both sides anew. Its result is appended to the output file at once, and the same command, given again,
makes the runs that are still missing and prints the table. Exit codes: 0 done, 2 bad usage or a run that failed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from evals.gate.cases import PROFILES
from evals.gate.judge import CANNOT_TELL, FAILED, REGRESSION, Verdict, exit_code, judge
from evals.gate.measure import ROOT, RunFailed, measure, run_command, short

MARGIN = 0.05
CLOCKS = ("wall", "cpu")
# What decides whether two runs belong in one table.
SAME = ("commit", "profile", "pairs", "margin")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m evals.gate.experiment", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--runs", type=_number, default=20, help="runs with each slowdown, those in the output file included (20)")
    add("--slowdown", type=_shares, default=[0.0, 0.05, 0.1], help="shares of head's work, a comma list (0,0.05,0.1)")
    add("--profile", choices=list(PROFILES), default="quick", help="as of the gate (quick)")
    add("--output", default="gate_experiment.jsonl", help="where each run is appended (gate_experiment.jsonl)")
    return parser


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    options = make_parser().parse_args(argv)
    profile = PROFILES[options.profile]
    path = Path(options.output)
    try:
        about = dict(zip(SAME, (short(root), options.profile, profile.pairs, MARGIN), strict=True))
        if about["commit"].endswith("+"):
            raise RunFailed("the checkout has changes, so head would not be the same as base: commit or stash them")
        runs = _read(path, about)
        for _ in range(options.runs):
            # in turn, so that what drifts over the hours meets every slowdown
            for slowdown in options.slowdown:
                if sum(run["slowdown"] == slowdown for run in runs) < options.runs:
                    runs.append(about | {"slowdown": slowdown} | _run(root, about, slowdown))
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
                    print(_line(runs[-1]), flush=True)
    except RunFailed as error:
        print(f"experiment: {error}", file=sys.stderr)
        return FAILED
    print("\n".join(table(runs)))
    return 0


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 10 for share in shares):
        raise argparse.ArgumentTypeError(f"must be shares from 0 to 10 such as 0,0.05,0.1; got {text!r}")
    return shares


def _read(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that the file holds. Raises RunFailed where they are of something else than `about`."""
    if not path.exists():
        return []
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            runs.append(json.loads(line))
        except ValueError as error:
            raise RunFailed(f"{path}:{number} is not a run ({error}): remove the line") from error
    for run in runs:
        differing = [key for key in SAME if run[key] != about[key]]
        if differing:
            key = differing[0]
            raise RunFailed(f"{path} holds runs with {key} {run[key]}, this is {about[key]}: give another --output")
    return runs


def _run(root: Path, about: dict[str, Any], slowdown: float) -> dict[str, Any]:
    found = measure(root, "HEAD", PROFILES[about["profile"]].cases, about["pairs"], slowdown)
    if {found.base, found.head} != {about["commit"]}:
        raise RunFailed(f"the checkout is no longer at {about['commit']}: go on from there, or with another --output")
    verdicts = [judge(case, p, MARGIN) for case, p in found.pairs.items()]
    return {
        "exit_code": exit_code(verdicts),
        "seconds": round(found.seconds, 1),
        "cases": {verdict.case.id: _figures(verdict) for verdict in verdicts},
    }


def _figures(verdict: Verdict) -> dict[str, Any]:
    ratios = {"wall": verdict.wall, "cpu": verdict.cpu}
    return {
        clock: {
            "ratio": [round(end, 5) for end in (ratio.typical, ratio.low, ratio.high)],
            "slower": ratio.is_slower(MARGIN),
            "can_tell": ratio.can_tell(MARGIN),
        }
        for clock, ratio in ratios.items()
    } | {"regressions": verdict.regressions, "unclear": verdict.unclear}


def _line(run: dict[str, Any]) -> str:
    ratios = "; ".join(
        f"{name} {c['wall']['ratio'][0]:.3f} {c['cpu']['ratio'][0]:.3f}" for name, c in run["cases"].items()
    )
    return f"slowdown {run['slowdown']:g}: exit code {run['exit_code']}, {run['seconds']:.0f} s; wall and CPU: {ratios}"


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Markdown: a row for each slowdown. Ratios are the medians over runs and cases, with their extremes."""
    lines = [
        "| slowdown | runs | failed | by wall time | by CPU time | cannot tell | wall ratio | CPU ratio | s a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for slowdown in sorted({run["slowdown"] for run in runs}):
        same = [run for run in runs if run["slowdown"] == slowdown]
        cells = [f"{100 * slowdown:g} %", len(same), sum(run["exit_code"] == REGRESSION for run in same)]
        cells += [sum(any(c[clock]["slower"] for c in run["cases"].values()) for run in same) for clock in CLOCKS]
        cells.append(sum(run["exit_code"] == CANNOT_TELL for run in same))
        for clock in CLOCKS:
            ratios = [case[clock]["ratio"][0] for run in same for case in run["cases"].values()]
            cells.append(f"{median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
        cells.append(round(median(run["seconds"] for run in same)))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    run_command(main)
