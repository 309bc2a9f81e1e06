"""The page's content as plain values, and the template filled with them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evals.report.beside import Baselines, baselines, names, on_frontier, series, speed_up, timeline
from evals.report.charts import History, Point, Scatter, history, scatter
from evals.report.labels import shortened
from evals.report.rows import Answers, Group, cut, gold, groups
from evals.results.aup import scores
from evals.results.reader import StoredRun
from evals.results.schema import Configuration
from evals.runs.configurations import SCHEDULED, extras

# Their order is that of the marks and colours; any other mode gets the last mark.
MODES = ("vanilla_llada", "vanilla", "prefix_cache", "dual_cache", "block", "block_refresh", "reference_impl")
MARKS = (
    "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0 -4.5 0Z",
    "M-4 -4H4V4H-4Z",
    "M0 -5L5 4H-5Z",
    "M0 5L5 -4H-5Z",
    "M0 -6L6 0L0 6L-6 0Z",
    "M0 -6L5.7 -1.9L3.5 4.9H-3.5L-5.7 -1.9Z",
    "M-1.7 -5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    "M-5 -3L-3 -5L0 -2L3 -5L5 -3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z",
)
WIDE, NARROW = (720, 400), (328, 380)  # pixels

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


@dataclass(frozen=True)
class Row:
    """A configuration `c` as shown on the page: its number and name, and whether it is on the frontier."""

    number: int
    name: str
    c: Configuration
    on: bool

    @property
    def kind(self) -> int:
        """Its mark and colour."""
        return MODES.index(self.c.mode) if self.c.mode in MODES else len(MODES)


class Source(NamedTuple):
    """A source, its number of rows if known, and each row's accuracy there with its interval."""

    name: str
    n: int | None
    bars: list[tuple[Row, float | None, tuple[float, float] | None]]


class Column(NamedTuple):
    """A column of the table: its name, its unit, and the text of a configuration's cell (None: not known)."""

    name: str
    unit: str
    cell: Callable[[Configuration], str | None]
    is_number: bool = True


class Found(NamedTuple):
    """The graded answers of each configuration, by row id, if there are any; the file's name, and the message if there
    are none."""

    answers: list[Answers] | None = None
    file: str = ""
    note: str | None = None


def render(run: StoredRun, history_runs: list[StoredRun], samples: Found | None = None) -> str:
    """The whole page; the same runs and answers give the same page."""
    found, samples = run.configurations, samples or Found()
    numbers = range(1, len(found) + 1)
    rows = [Row(*row) for row in zip(numbers, names(found), found, on_frontier(found), strict=True)]
    runs, others = timeline(run, history_runs)
    measured = [row for row in rows if row.c.tokens_per_second]
    return TEMPLATES.get_template("page.html.jinja").render(
        run=run,
        rows=rows,
        columns=[column for column in columns(found) if "%" not in column.unit or any(map(column.cell, found))],
        marks=MARKS,
        about=about(run),
        fastest=max(measured, key=lambda row: row.c.tokens_per_second, default=None),
        ratios=partial(_ratios, of=baselines(found)),
        is_random=any(c.weights == "random" for c in found),
        scatters=_scatters(rows),
        not_drawn=[row.name for row in rows if None in (row.c.accuracy, row.c.tokens_per_second)],
        resumed=[row.name for row in rows if row.c.resumed],
        scores=_scores(rows),
        sources=_sources(rows),
        runs=runs,
        commits=[_commit(r) for r in runs],
        others=others,
        answers=_answers(rows, samples.answers),
        answers_file=samples.file,
        answers_note=samples.note,
        gold=gold,
        cut=cut,
        histories=_histories(rows, runs),
        when=when,
        speed=lambda value: f"{value:,.1f}",
        percent=percent,
        points=lambda value: f"{100 * value:+.1f}".replace("-", "−"),
        shortened=shortened,
        share=lambda value: f"{100 * value:.4g}%",
    )


def _answers(rows: list[Row], answers: list[Answers] | None) -> list[tuple[Row, list[Group], bool]]:
    """For each configuration with answers, and whether there are vanilla's beside them."""
    if answers is None:
        return []
    of, by_row = baselines([row.c for row in rows]), {id(row.c): one for row, one in zip(rows, answers, strict=True)}
    found = []
    for row, own in zip(rows, answers, strict=True):
        semi = of(row.c)[1]
        vanilla = None if semi is None or semi is row.c else by_row[id(semi)]
        if own:
            found.append((row, groups(own, vanilla), bool(vanilla)))
    return found


def columns(run: list[Configuration]) -> list[Column]:
    def field(name: str, spec: str) -> Callable[[Configuration], str | None]:
        return lambda c: None if getattr(c, name) is None else format(getattr(c, name), spec)

    def ratio(index: int) -> Callable[[Configuration], str | None]:
        return lambda c: _ratios(c, of)[index]

    of = baselines(run)
    # what fits on a phone comes first
    return [
        Column("speed", "tokens/s", field("tokens_per_second", ",.1f")),
        Column("accuracy", "%", lambda c: percent(c.accuracy)),
        Column("block", "positions", field("block_length", "d")),
        Column("rule", "", _rule, is_number=False),
        *[Column("extras", "", _extras, is_number=False)] * any(map(_extras, run)),
        Column("limit", "steps", _step_limit),
        Column("error", "± %", lambda c: percent(c.relative_error)),
        Column("speed-up", "× vanilla", ratio(1)),
        Column("speed-up", "× vanilla_llada", ratio(0)),
        Column("tokens", "/forward", field("tokens_per_forward", ",.2f")),
        Column("NFE", "forwards", field("nfe", ",d")),
        Column("forward", "ms", field("ms_per_forward", ",.1f")),
        Column("interval", "95 %", lambda c: _interval(c.accuracy_interval)),
        Column("latency", "p50, s", field("latency_p50", ",.2f")),
        Column("latency", "p95, s", field("latency_p95", ",.2f")),
    ]


def _ratios(c: Configuration, of: Baselines) -> tuple[str | None, str | None]:
    """Over vanilla_llada and over vanilla."""
    standard, semi = of(c)
    return _ratio(c, standard, c.interval_over_standard), _ratio(c, semi, c.interval_over_vanilla)


def _ratio(c: Configuration, baseline: Configuration | None, interval: tuple[float, float] | None) -> str | None:
    """With its interval; a file of an older commit has none, but may say that there was one round."""
    ratio = speed_up(c, baseline)
    if ratio is None or c is baseline:
        return None if ratio is None else f"{ratio:,.2f}"
    if interval is not None:
        return f"{ratio:,.2f} ({interval[0]:,.2f}–{interval[1]:,.2f})"
    return f"{ratio:,.2f}" + " (one round)" * (1 in (c.rounds, baseline.rounds))


def _rule(c: Configuration) -> str | None:
    if c.rule_value is None or c.unmasking in (None, *SCHEDULED):
        return c.unmasking
    return f"{c.unmasking} {c.rule_value:g}"


def _extras(c: Configuration) -> str | None:
    """What differs from one block at a time."""
    return ", ".join(extras(c)) or None


def _step_limit(c: Configuration) -> str | None:
    if c.block_steps is None:
        return "none" if "denoising_steps" in c.model_fields_set else None
    return str(c.block_steps)


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}"


def _interval(interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else f"{100 * interval[0]:.0f}–{100 * interval[1]:.0f}"


def when(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M %Z}"


def about(run: StoredRun) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the figures depend on, in groups of (name, value); what no configuration knows is left out."""

    def of(field: str) -> str | None:
        found = dict.fromkeys(str(v) for c in run.configurations if (v := getattr(c, field)) is not None)
        return ", ".join(found) or None

    first = run.configurations[0]
    groups = {
        "Model": {
            "model": of("model"),
            "weights": of("weights"),
            "dtype": of("dtype"),
            "quantization": of("quantization"),
        },
        "Machine": {
            "device": of("device"),
            "GPU": of("gpu"),
            "CPU": of("cpu"),
            "CPU threads": of("cpu_threads"),
            "ranks": of("tensor_parallel_size")
            if any(c.tensor_parallel_size > 1 for c in run.configurations)
            else None,
        },
        "Versions": {
            "commit": run.commit,
            "torch": of("torch"),
            "CUDA": of("cuda"),
            "transformers": of("transformers"),
            "Python": of("python"),
        },
        "Rows": {
            "dataset": of("dataset"),
            "revisions": ", ".join(first.dataset_revisions or ()) or None,
            "rows": of("n"),
            "shard": f"{first.shard.index} of {first.shard.of}" if first.shard else None,
            "merged shards": str(first.shards) if first.shards > 1 else None,
            "prompts cut to fit": of("prompts_truncated"),
        },
        "Settings": {
            "tokens, at most": of("max_tokens"),
            "requests at once": of("batch_size"),
            "temperature": of("temperature"),
            "stop token": "ignored" if first.ignore_eos else None,
            "timed rounds": of("rounds"),
        },
    }
    known = {title: [(k, v) for k, v in values.items() if v is not None] for title, values in groups.items()}
    return [(title, values) for title, values in known.items() if values]


def _scatters(rows: list[Row]) -> list[Scatter]:
    """The same plot for wide and for narrow windows; none without an accuracy."""
    points = [
        Point(row.number, row.name, c.tokens_per_second, c.accuracy, c.accuracy_interval, row.on)
        for row in rows
        if None not in ((c := row.c).accuracy, c.tokens_per_second)
    ]
    return [scatter(points, *size) for size in (WIDE, NARROW)] if points else []


def _scores(rows: list[Row]) -> list[tuple[Row, int | None, str, float, int]]:
    """AUP of each mode, block length and window measured with several rules, and the number of rules; with the first of
    their rows."""
    first: dict[tuple, Row] = {}
    points = []
    for row in rows:
        c = row.c
        if None not in (c.accuracy, c.tokens_per_forward):
            key = c.mode, c.asked_block_length, ", ".join(extras(c))
            first.setdefault(key, row)
            points.append((key, (c.tokens_per_forward, 100 * c.accuracy)))
    return [(first[key], *key[1:], score, number) for key, (score, number) in scores(points).items()]


def _sources(rows: list[Row]) -> list[Source]:
    sources = []
    for name in dict.fromkeys(name for row in rows for name in row.c.accuracy_by_source):
        n = next((n for row in rows if (n := row.c.n_by_source.get(name))), None)
        bars = [(row, row.c.accuracy_by_source.get(name), row.c.interval_at(name)) for row in rows]
        sources.append(Source(name, n, bars))
    return sources


def _histories(rows: list[Row], runs: list[StoredRun]) -> list[tuple[Row, History]]:
    """A chart for each configuration that more than one run has measured."""
    commits = [_commit(run) for run in runs]
    found = zip(rows, series([row.c for row in rows], runs), strict=True)
    return [(row, history(values, commits)) for row, values in found if sum(v is not None for v in values) > 1]


def _commit(run: StoredRun) -> str:
    """Short enough for an axis, without the part that `git describe` puts before the hash; "+": files differed from
    it."""
    if run.commit is None:
        return f"{run.when:%m-%d}"
    return run.commit.removesuffix("+").rsplit("-g", 1)[-1][:7] + "+" * run.commit.endswith("+")
