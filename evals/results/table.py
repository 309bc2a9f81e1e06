"""The lines printed at the end of a run."""

from typing import Any

from evals.results.aup import scores
from evals.results.comparison import baselines, speed_up
from evals.results.paired import rule_width
from evals.results.schema import is_often
from evals.results.wilson import wilson_interval
from evals.runs.configurations import extras, rule_name
from evals.runs.rounds import standard_error
from evals.runs.run import Run, by_source, unextracted
from evals.runs.settings import Settings


def table(runs: list[Run]) -> list[str]:
    """A row per configuration, as lines of text; speed-ups are ratios of tokens/s at the same rule."""
    width = rule_width(runs)
    head = f"{'mode':<14}{'block':>5}  {'rule':<{width}}{'tokens/s':>9}{'+-%':>5}{'tok/fwd':>8}{'NFE':>7}{'ms/fwd':>7}"
    lines = [head + f"{'accuracy':>15}{'x standard':>18}{'x vanilla':>18}"]
    for run in runs:
        case = run.case
        error = standard_error(run.seconds)
        speed, step = (f"{run.tokens_per_second:.1f}", f"{run.ms_per_forward:.1f}") if run.seconds else ("resumed", "-")
        line = f"{case.mode:<14}{case.block_length:>5}  {rule_name(case.params):<{width}}{speed:>9}"
        line += f"{'-' if error is None else f'{100 * error:.1f}':>5}"
        line += f"{run.tokens / run.nfe:>8.2f}{run.nfe:>7}{step:>7}{_accuracy(run):>15}"
        lines.append(line + "".join(f"{_times(run, baseline):>18}" for baseline in baselines(case, runs)))
    lines += [f"{run.case.mode} {run.case.block_length} is not steady: {run.unsteady}" for run in runs if run.unsteady]
    return lines


def number_format(info: dict[str, Any]) -> str:
    """The number format of the model's computation: such as bfloat16, or "bfloat16 and fp8" if its layers are
    quantised."""
    return " and ".join(filter(None, (info["dtype"], info.get("quantization"))))


def first_pass_line(runs: list[Run]) -> str | None:
    """None if nothing was warmed up."""
    known = [f"{run.case.mode} {run.first_seconds:.2f}" for run in runs if run.first_seconds is not None]
    return f"first batch, untimed, a step a block, s: {', '.join(known)}" if known else None


def aup_lines(runs: list[Run]) -> list[str]:
    """A line for each mode and block length that several rules were measured with."""
    points = [
        ((r.case.mode, r.case.block_length, *extras(r.case.params)), (r.tokens / r.nfe, 100 * r.accuracy))
        for r in runs
        if r.accuracy is not None
    ]
    found = [f"{' '.join(map(str, key))} {score:.0f} ({n} rules)" for key, (score, n) in scores(points).items()]
    return [f"AUP, accuracy under parallelism: {', '.join(found)}"] if found else []


def unextracted_lines(runs: list[Run], settings: Settings) -> list[str]:
    """A line if more than a tenth of a configuration's answers to a source held nothing to judge."""
    lines = []
    for run in runs:
        case, all_of = run.case, by_source(run, settings)
        for source, number in unextracted(run, settings).items():
            n = len(all_of[source])
            if is_often(number, n):
                name = f"{case.mode} {case.block_length} {rule_name(case.params)}"
                lines.append(f"{name}: in {number} of {n} answers to {source} the grader found nothing to judge")
    return lines


def _accuracy(run: Run) -> str:
    if not run.grades:
        return "random weights"
    low, high = wilson_interval(sum(g.correct for g in run.grades), len(run.grades))
    return f"{100 * run.accuracy:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def _times(run: Run, baseline: Run | None) -> str:
    if run is baseline and run.seconds:
        return "1"
    ratio = speed_up(run, baseline)
    return str(ratio) if ratio else "-"


def loading_line(info: dict[str, Any]) -> str:
    if not info["graphs"]:
        return f"loaded in {info['load_seconds']:.1f} s"
    return (
        f"loaded in {info['load_seconds']:.1f} s, of which {info['capture_seconds']:.1f} for capturing "
        f"{info['graphs']} CUDA graphs, which take {info['graph_bytes'] / 1e9:.2f} GB"
    )
