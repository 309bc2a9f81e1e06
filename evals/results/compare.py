"""Compares two results of the suite, files of `pytest evals/ --benchmark-json`: is the new one worse than the old?

    python -m evals compare old.json new.json

pytest-benchmark compares times; this judges what it cannot: tokens/s and peak memory by a margin, forwards, accuracy
row by row, and whether every case is still there.

Exit codes: 0 not worse, 1 worse, 2 bad usage or not comparable.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from evals.files import show, text_argument
from evals.results.forwards import nfe_fault
from evals.results.paired import Paired
from evals.results.reader import BadFile, check_whole, read_file
from evals.results.wilson import wilson_interval
from evals.runs.configurations import ALONE, PLAIN, RESUMED, is_configuration

NOT_WORSE, WORSE, NOT_COMPARABLE = range(3)

# If one of these differs, two runs answer different questions.
QUESTION = (
    *("mode", "unmasking", "block_length", "denoising_steps", "rule_value", "max_tokens", "temperature", "ignore_eos"),
    *("batch_size", "dataset", "n", "rows_sha256", "prompts_version", "prompts_truncated", "grader_versions"),
    *("model", "weights", "dtype", "quantization"),
    *PLAIN,
)
# The same for steps, besides the fields that they share with configurations.
STEP_QUESTION = ("requests", "prompt_tokens", "new_tokens", "max_num_seqs")
# If one of these differs, speed and memory say nothing about the code. Those of SOFTWARE are only reported.
MACHINE = ("device", "gpu", "cpu", "cpu_threads", "tensor_parallel_size", "shards")
SOFTWARE = ("torch", "cuda", "transformers", "python")
# What is judged, and the fields that judging needs.
FIGURES = ("unmasking", "n", "nfe", "tokens_per_second", "peak_memory_gib", "accuracy")
# The assumed error of a GPU's time from one round, as a share. A CPU's is not known: on two shared cores, tokens/s of
# the same code differed by up to a factor of 1.7 between two runs.
ERROR_OF_ONE_ROUND = 0.1

Info = dict[str, Any]
Match = tuple[str, Info, Info]


class NotComparable(Exception):
    """What differs, or what is wrong with a file."""


@dataclass
class Comparison:
    """lines are a table; worse and notes are sentences. The new result is worse if `worse` is not empty."""

    margin: float
    max_accuracy_loss: float
    lines: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(path: str) -> dict[str, Info]:
    """The extra_info of each benchmark of a result file except kernels and steps, by name. Raises NotComparable."""
    try:
        file = read_file(path)
        check_whole(file, path, FIGURES)
    except BadFile as error:
        raise NotComparable(str(error)) from error
    if not file.configurations:
        raise NotComparable(f"{path}: holds no figures of pytest evals/: no benchmark has nfe in its extra_info")
    found: dict[str, Info] = {}
    for benchmark in file.benchmarks:
        name, info = benchmark.name.removesuffix(RESUMED), benchmark.extra_info
        if is_configuration(info) and found.setdefault(name, info) is not info:
            raise NotComparable(f"{path}: holds two benchmarks of the name {name}")
    return found


def compare(
    old: dict[str, Info],
    new: dict[str, Info],
    margin: float,
    max_accuracy_loss: float,
    allow_missing: bool,
) -> Comparison:
    """margin: the share by which tokens/s may fall, beyond the uncertainty of their rounds, and peak memory rise.
    max_accuracy_loss: a share of the rows.

    Raises NotComparable if the two have different rows or settings.
    """
    result = Comparison(margin, max_accuracy_loss)
    matches = _match(old, new, result, allow_missing)
    _check_comparable(matches)
    _note_environment(matches, result)
    width = max(len(name) for name, _, _ in matches)
    result.lines.append(f"{'old -> new':<{width}}{'tokens/s':>18}{'NFE':>18}{'peak GiB':>18}{'right':>14}")
    for name, before, after in matches:
        if "nfe" not in before:
            continue
        if after and "nfe" not in after:
            raise NotComparable(f"{name}: the new file's extra_info has neither mode nor nfe")
        if not after:
            result.worse.append(f"{name}: the new file has no figures for it, so its run failed")
            continue
        result.lines.append(f"{name:<{width}}" + _figures(before, after))
        _judge_speed(name, before, after, result)
        fault = nfe_fault(after["unmasking"], before["nfe"], after["nfe"])
        if fault:
            result.worse.append(f"{name}: {fault}")
        _judge_accuracy(name, before, after, result)
    return result


def _match(old: dict[str, Info], new: dict[str, Info], result: Comparison, allow_missing: bool) -> list[Match]:
    """By name, else by equal settings: a test or a parameter may have been renamed."""
    matches = [(name, info, new[name]) for name, info in old.items() if name in new]
    added = {name: info for name, info in new.items() if name not in old}
    for name in [name for name in old if name not in new]:
        measured = {other: info for other, info in added.items() if "nfe" in info and "nfe" in old[name]}
        same = [other for other, info in measured.items() if not differences(old[name], info)]
        if same:
            result.notes.append(f"{name} is now called {same[0]}")
            matches.append((same[0], old[name], added.pop(same[0])))
        elif allow_missing:
            result.notes.append(f"{name} is missing in the new file: allowed")
        else:
            result.worse.append(f"{name} is missing in the new file; if that is intended: --allow-missing")
    result.notes += [f"{name} is new: there is nothing to compare it with" for name in added]
    return matches


def differences(before: Info, after: Info) -> list[str]:
    """Settings that differ. A setting that either side lacks, as a file of an older commit may, is ignored; a file that
    does not say which blocks were open had one open at a time."""
    before, after = PLAIN | before, PLAIN | after
    both = [key for key in QUESTION + STEP_QUESTION if key in before and key in after]
    found = [f"{key} was {before[key]}, is {after[key]}" for key in both if before[key] != after[key]]
    if _ids(before) != _ids(after) and _ids(before) and _ids(after):
        found.append("the rows have other ids")
    return found


def _ids(info: Info) -> list[str]:
    return [row[0] for row in info.get("rows") or []]


def _check_comparable(matches: list[Match]) -> None:
    differing = [(name, found) for name, before, after in matches if (found := differences(before, after))]
    if differing:
        raise NotComparable("\n".join(f"{name}: {'; '.join(found)}" for name, found in differing))
    if not matches:
        raise NotComparable("the two files have no case in common")


def _note_environment(matches: list[Match], result: Comparison) -> None:
    for key in (*MACHINE, *SOFTWARE):
        both = {(_of(key, b), _of(key, a)) for _, b, a in matches}
        changes = {(before, after) for before, after in both if before != after}
        unjudged = ": tokens/s and memory are not judged" if key in MACHINE else ""
        result.notes += [f"{key} was {before}, is {after}{unjudged}" for before, after in sorted(changes, key=str)]
    if any(_is_unknown_time(info) for _, *both in matches for info in both):
        result.notes.append("on a CPU one round does not tell how well its time is known: tokens/s is not judged there")
    if any("nfe" in info and "rows_sha256" not in info for _, *both in matches for info in both):
        result.notes.append("a file does not hold a hash of its rows: that their text is the same is not certain")


def _of(key: str, info: Info) -> Any:
    return info.get(key, ALONE.get(key))


def _judge_speed(name: str, before: Info, after: Info, result: Comparison) -> None:
    if any(_of(key, before) != _of(key, after) for key in MACHINE):
        return
    speeds = before["tokens_per_second"], after["tokens_per_second"]
    if None in speeds:
        result.notes.append(f"{name}: a resumed run has no speed, so tokens/s is not judged")
    elif not speeds[0]:
        result.notes.append(f"{name}: the old file has 0 tokens/s, so there is nothing to judge the new one's by")
    elif not _is_unknown_time(before) and not _is_unknown_time(after):
        ratio = speeds[1] / speeds[0]
        # 97.5 % confidence, as far as the rounds of one session can give it
        most = ratio * math.exp(1.96 * math.hypot(_error(before), _error(after)))
        if most < 1 - result.margin:
            says = f"tokens/s is {ratio:.3f} times the old, {most:.3f} at most, below {1 - result.margin:g}"
            result.worse.append(f"{name}: {says}")
    peaks = before["peak_memory_gib"], after["peak_memory_gib"]
    if peaks.count(None) == 1:
        result.notes.append(f"{name}: one of the two does not know its peak memory, so it is not judged")
    elif None not in peaks and peaks[1] > peaks[0] * (1 + result.margin):
        ratio = peaks[1] / peaks[0]
        result.worse.append(f"{name}: peak memory is {ratio:.3f} times the old, beyond {1 + result.margin:g}")


def _is_unknown_time(info: Info) -> bool:
    """Whether it has a speed whose uncertainty is not known."""
    on_cpu, speed = info.get("device") == "cpu", info.get("tokens_per_second")
    return on_cpu and speed is not None and info.get("relative_error") is None


def _error(info: Info) -> float:
    """The standard error of a time, as a share of it."""
    known = info.get("relative_error")
    return ERROR_OF_ONE_ROUND if known is None else known


def _judge_accuracy(name: str, before: Info, after: Info, result: Comparison) -> None:
    if before["accuracy"] is None or after["accuracy"] is None:
        return
    if _ids(before) and _ids(after):
        changes = [(b[3], a[3]) for b, a in zip(before["rows"], after["rows"], strict=True)]
        both = Paired(len(changes), changes.count((True, False)), changes.count((False, True)))
        loss = both.lower()
        how = f"{both.lost} rows lost and {both.won} won of {both.n}"
    else:
        loss = unpaired_loss(before, after)
        how = f"{_right(before)} rows right before and {_right(after)} now of {before['n']}"
        result.notes.append(f"{name}: a file does not hold each row's grade, so accuracy is compared unpaired: {how}")
    if loss > result.max_accuracy_loss:
        certain = f"with 95 % confidence a loss of {100 * loss:.1f} points or more"
        result.worse.append(f"{name}: {how}: {certain}, over {100 * result.max_accuracy_loss:g}")


def unpaired_loss(before: Info, after: Info) -> float:
    """The share lost at least, with 97.5 % confidence (R. G. Newcombe, method 10, Statistics in Medicine 17, 1998, p.
    873)."""
    low, _ = wilson_interval(_right(before), before["n"])
    _, high = wilson_interval(_right(after), after["n"])
    before, after = before["accuracy"], after["accuracy"]
    return before - after - math.hypot(before - low, high - after)


def _right(info: Info) -> int:
    return round(info["accuracy"] * info["n"])


def _figures(before: Info, after: Info) -> str:
    def change(old: float | None, new: float | None, form: str) -> str:
        return " -> ".join("-" if value is None else format(value, form) for value in (old, new))

    def figure(key: str, form: str) -> str:
        return change(before[key], after[key], form)

    right = change(*(None if info["accuracy"] is None else _right(info) for info in (before, after)), "d")
    speed, memory = figure("tokens_per_second", ".1f"), figure("peak_memory_gib", ".2f")
    return f"{speed:>18}{figure('nfe', 'd'):>18}{memory:>18}{right:>14}"


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 100, got {text!r}")
    return value / 100


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m evals compare", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("old", type=text_argument, help="a file of pytest evals/ --benchmark-json")
    add("new", type=text_argument, help="a later one")
    add("--margin", type=_percent, default=0.05, help="percent by which tokens/s may fall and peak memory rise (5)")
    add("--max-accuracy-loss", type=_percent, default=0.03, help="points of accuracy that a case may lose (3)")
    add("--allow-missing", action="store_true", help="a case that is gone is no failure")
    parser.epilog = __doc__.rpartition("\n\n")[2]
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    try:
        old, new = read(options.old), read(options.new)
        result = compare(old, new, options.margin, options.max_accuracy_loss, options.allow_missing)
    except NotComparable as error:
        show(f"compare: these cannot be compared: {error}", sys.stderr)
        return NOT_COMPARABLE
    show("\n".join([*result.lines, *result.notes, *(f"WORSE {text}" for text in result.worse)]), sys.stdout)
    show("the new result is worse" if result.worse else "the new result is not worse", sys.stdout)
    return WORSE if result.worse else NOT_WORSE
