"""What an experiment stores of each run of the gate, and the table of many runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evals.gate.cases import Worse
from evals.gate.checkout import RunFailed
from evals.gate.exits import CANNOT_TELL, REGRESSION
from evals.gate.judge import Margins, Ratio, Verdict
from evals.gate.side import Bytes

# The fields that decide whether two runs belong in one table.
SAME = ("commit", "profile", "pairs", "margin", "memory_margin")

Number = Annotated[float, Field(gt=0, le=1e9)]  # NaN fails both comparisons
Pair = tuple[Bytes, Bytes]


class Kept(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Clock(Kept):
    """ratio: the typical one and the ends of its interval."""

    ratio: tuple[Number, Number, Number]
    slower: bool
    can_tell: bool

    @classmethod
    def of(cls, ratio: Ratio, margin: float) -> "Clock":
        ends = ratio.typical, ratio.low, ratio.high
        shown = tuple(round(end, 5) for end in ends)
        return cls(ratio=shown, slower=ratio.is_slower(margin), can_tell=ratio.can_tell(margin))


class Case(Kept):
    wall: Clock
    cpu: Clock
    slowed: bool
    peaks: Pair
    regressions: list[str]
    unclear: list[str]

    @classmethod
    def of(cls, verdict: Verdict, worse: Worse, margins: Margins) -> "Case":
        wall, cpu = (Clock.of(ratio, margins.time) for ratio in (verdict.wall, verdict.cpu))
        found = {name: getattr(verdict, name) for name in ("peaks", "regressions", "unclear")}
        return cls(wall=wall, cpu=cpu, slowed=worse.work(verdict.case) > 0, **found)


class Run(Kept):
    commit: str
    profile: str
    pairs: int
    margin: float
    memory_margin: float
    slowdown: Annotated[float, Field(ge=0, le=10)]
    where: str
    exit_code: Annotated[int, Field(ge=0, le=3)]
    seconds: Number
    held: Pair
    cases: Annotated[dict[str, Case], Field(min_length=1)]

    @property
    def worse(self) -> Worse:
        return Worse(self.slowdown, self.where)

    @property
    def slowed(self) -> list[Case]:
        """The cases that were slowed down; all if none was."""
        cases = list(self.cases.values())
        return [case for case in cases if case.slowed] or cases

    @property
    def others(self) -> list[Case]:
        return [case for case in self.cases.values() if case not in self.slowed]

    @property
    def memory(self) -> list[float]:
        """head / base of all memory measured."""
        return [after / before for before, after in (self.held, *(case.peaks for case in self.cases.values()))]

    def __str__(self) -> str:
        ratios = "; ".join(f"{name} {c.wall.ratio[0]:.3f} {c.cpu.ratio[0]:.3f}" for name, c in self.cases.items())
        return f"slowdown {self.worse}: exit code {self.exit_code}, {self.seconds:.0f} s; wall and CPU: {ratios}"


def read_runs(path: Path, about: dict[str, object]) -> list[Run]:
    """The runs in the file. Raises RunFailed if they are of anything other than `about`."""
    runs = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            run = Run.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors()[0]
            what = " ".join([".".join(map(str, fault["loc"])), fault["msg"]]).strip()
            raise RunFailed(f"{path}:{number} is not a run ({what}): remove the line") from error
        for key in SAME:
            if getattr(run, key) != about[key]:
                old, new = getattr(run, key), about[key]
                raise RunFailed(f"{path} holds runs with {key} {old}, this is {new}: give another --output")
        runs.append(run)
    return runs


def table(runs: Sequence[Run]) -> list[str]:
    """Markdown: a row for each slowdown. Ratios are medians over runs and cases, with their extremes. For a slowdown in
    one place, they and the alarms by a clock count only the cases that have it."""
    lines = [
        "| slowdown | runs | failed | by wall time | by CPU time | by memory | other cases | cannot tell | wall ratio "
        "| CPU ratio | memory | s a run |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for worse in sorted({run.worse for run in runs}, key=lambda worse: (worse.where, worse.share)):
        same = [run for run in runs if run.worse == worse]

        def count(holds: Callable[[Run], bool], same: list[Run] = same) -> int:
            return sum(map(holds, same))

        ratios = [
            [case.wall.ratio[0] for run in same for case in run.slowed],
            [case.cpu.ratio[0] for run in same for case in run.slowed],
            [ratio for run in same for ratio in run.memory],
        ]
        cells = [
            worse,
            len(same),
            count(lambda run: run.exit_code == REGRESSION),
            count(lambda run: any(case.wall.slower for case in run.slowed)),
            count(lambda run: any(case.cpu.slower for case in run.slowed)),
            count(lambda run: max(run.memory) > 1 + run.memory_margin),
            count(lambda run: any(case.wall.slower or case.cpu.slower for case in run.others)),
            count(lambda run: run.exit_code == CANNOT_TELL),
            *(f"{median(r):.3f} ({min(r):.3f}-{max(r):.3f})" for r in ratios),
            round(median(run.seconds for run in same)),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines
