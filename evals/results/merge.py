"""`python -m evals merge OUT SHARD...`: merges the pytest-benchmark files of a run's shards (--shard) into one run's
file.

Rows, tokens, forwards and grades are those of all rows, in their order. The time is the slowest shard's, as if all had
run at once, each on its own device; tokens/s follow from it, and latencies over all rows are not known (null).
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from evals.files import check_output, path_argument, show, write_output
from evals.results.paired import Paired, stored
from evals.results.reader import check_content, check_whole, read_file
from evals.results.wilson import wilson_interval
from evals.runs.configurations import RESUMED

Json = dict[str, Any]

# What is added up; the settings must agree.
FIGURES = (
    *("n", "tokens", "steps", "nfe", "prompts_truncated", "stopped", "resumed", "shard", "rows", "accuracy", "seconds"),
    *("forwards", "rounds", "mean_prompt_tokens", "peak_memory_gib", "dataset_revisions"),
    *("n_by_source", "accuracy_by_source", "score_by_source"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser("python -m evals merge", description="Merges the shards of a run into one file.")
    parser.add_argument("out", type=path_argument, help="the file to write")
    parser.add_argument("shards", type=path_argument, nargs="+", help="what --benchmark-json wrote, of every shard")
    options = parser.parse_args(arguments)
    try:
        check_output(options.out, options.shards)
        result = merge([(str(path), read(path)) for path in options.shards])
        text = json.dumps(result, indent=4, allow_nan=False) + "\n"
        # each file may be valid and their sum not
        check_content(json.loads(text), "the sum of the shards")
        write_output(options.out, text)
    except ValueError as error:
        show(f"merge: {error}", sys.stderr)
        return 2
    number = result["benchmarks"][0]["extra_info"]["n"]
    about = f"{len(options.shards)} shards, {number} rows, {len(result['benchmarks'])} configurations"
    show(f"{about}: {options.out}", sys.stdout)
    return 0


def read(path: Path) -> Json:
    """Without kernels and steps, which every shard times alike. Raises ValueError for a file that holds no shard."""
    file = read_file(path)
    shards = [configuration.shard for configuration in file.configurations.values()]
    if not shards or None in shards:
        raise ValueError(f"{path}: holds no shard: the suite was not run with --shard")
    check_whole(file, path, FIGURES)
    benchmarks = [file.content["benchmarks"][number] for number in file.configurations]
    for benchmark, shard in zip(benchmarks, shards, strict=True):
        where = f"{path}: {benchmark['name']!r:.80}"
        lacks = [key for key in ("fullname", "group", "stats") if benchmark.get(key) is None]
        if not lacks and benchmark["stats"].get("median") is None:
            lacks = ["stats.median"]
        if shard.positions is None or shard.rows is None:
            lacks = ["extra_info: shard: positions or rows"]
        if lacks:
            raise ValueError(f"{where}: {lacks[0]}: a value is required, there is none")
        if shard != shards[0]:
            raise ValueError(f"{where}: extra_info: shard: another than that of {benchmarks[0]['name']!r:.80}")
    return file.content | {"benchmarks": benchmarks}


def merge(files: list[tuple[str, Json]]) -> Json:
    """(name, content) of every shard's file, in any order -> the content of one.

    Raises ValueError, naming the shards, if some are missing, duplicated, or of different rows or settings.
    """
    _check_shards([(path, _shard(content)) for path, content in files])
    by_name: dict[str, dict[str, Json]] = defaultdict(dict)
    for path, content in files:
        for benchmark in content["benchmarks"]:
            by_name[benchmark["fullname"].removesuffix(RESUMED)][path] = benchmark
    for name, benchmarks in by_name.items():
        _check_settings(name, benchmarks, [path for path, _ in files])
    merged = [_merge_benchmark(list(benchmarks.values())) for benchmarks in by_name.values()]
    return files[0][1] | {"benchmarks": merged, "datetime": max(content["datetime"] for _, content in files)}


def _shard(content: Json) -> Json:
    return content["benchmarks"][0]["extra_info"]["shard"]


def _check_shards(shards: list[tuple[str, Json]]) -> None:
    (first, base), *others = shards
    for path, shard in others:
        if shard["of"] != base["of"]:
            has, wants = (f"{s['index']}/{s['of']}" for s in (shard, base))
            raise ValueError(f"{path} is shard {has}, {first} is shard {wants}")
        if shard["rows"] != base["rows"]:
            raise ValueError(f"{path} and {first} are shards of different rows")
    paths = defaultdict(list)
    for path, shard in shards:
        paths[shard["index"]].append(path)
    faults = [f"shard {i} is there {len(same)} times: {', '.join(same)}" for i, same in paths.items() if same[1:]]
    number = base["of"] - len(paths)
    if number:
        # in a damaged file, the number of shards may be anything
        missing = islice((str(index) for index in count(1) if index not in paths), min(number, 9))
        more = ", ..." if number > 9 else ""
        faults.append(f"missing of {base['of']} shards: {', '.join(missing)}{more}")
    if faults:
        raise ValueError("; ".join(faults))
    positions = sorted(position for _, shard in shards for position in shard["positions"])
    if positions != list(range(len(positions))):
        names = ", ".join(path for path, _ in shards)
        raise ValueError(f"shard.positions: not each row is there once in {names}")


def _check_settings(name: str, benchmarks: dict[str, Json], paths: list[str]) -> None:
    lacking = [path for path in paths if path not in benchmarks]
    if lacking:
        raise ValueError(f"{', '.join(lacking)}: there is no {name}, which {next(iter(benchmarks))} has")
    base, *infos = (benchmarks[path]["extra_info"] for path in paths)
    for path, info in zip(paths[1:], infos, strict=True):
        for key in sorted((base.keys() | info.keys()) - _combine([base]).keys()):
            if base.get(key) != info.get(key):
                raise ValueError(f"{path} has {key} {info.get(key)!r}, {paths[0]} has {base.get(key)!r}: {name}")


def _merge_benchmark(benchmarks: list[Json]) -> Json:
    """pytest-benchmark's own record is the slowest shard's."""
    slowest = max(benchmarks, key=lambda benchmark: benchmark["stats"]["median"])
    resumed = next((benchmark for benchmark in benchmarks if benchmark["extra_info"]["resumed"]), slowest)
    titles = {key: resumed[key] for key in ("group", "name", "fullname")}
    infos = [benchmark["extra_info"] for benchmark in benchmarks]
    return slowest | titles | {"extra_info": infos[0] | _combine(infos)}


def _combine(infos: list[Json]) -> Json:
    """The fields of the shards' extra_info whose value differs for all rows; the rest are settings, which must
    agree."""
    sums = {
        k: sum(i[k] for i in infos) for k in ("n", "tokens", "steps", "nfe", "prompts_truncated", "stopped", "resumed")
    }
    n, tokens = sums["n"], sums["tokens"]
    numbered = [pair for i in infos for pair in zip(i["shard"]["positions"], i["rows"], strict=True)]
    rows = [row for _, row in sorted(numbered)]
    correct = [row[3] for row in rows]
    graded = None not in correct
    memory = [i["peak_memory_gib"] for i in infos]
    against = [i.get("against_vanilla") for i in infos]
    pairs = Paired(*(sum(a[k] for a in against) for k in Paired._fields)) if None not in against else None
    sources = sum((Counter(i["n_by_source"]) for i in infos), Counter())
    return (
        sums
        | _speed(infos, tokens)
        | _loading(infos)
        | {
            "rows_sha256": infos[0]["shard"]["rows"],
            "shard": None,
            "shards": len(infos),
            "rows": rows,
            "dataset_revisions": sorted({revision for i in infos for revision in i["dataset_revisions"]}),
            "tokens_per_step": tokens / sums["steps"],
            "tokens_per_forward": tokens / sums["nfe"],
            "mean_prompt_tokens": sum(i["mean_prompt_tokens"] * i["n"] for i in infos) / n,
            "mean_generated_tokens": tokens / n,
            "peak_memory_gib": None if None in memory else max(memory),
            "accuracy": sum(correct) / n if graded else None,
            "accuracy_interval": wilson_interval(sum(correct), n) if graded else None,
            "against_vanilla": stored(pairs) if pairs else None,
            "n_by_source": dict(sources),
            "accuracy_by_source": _mean_by_source("accuracy_by_source", infos, sources),
            "score_by_source": _mean_by_source("score_by_source", infos, sources),
            "unextracted_by_source": _unextracted(infos),
            "longbench_f1_by_source": _mean_by_source("longbench_f1_by_source", infos, sources),
        }
    )


def _mean_by_source(key: str, infos: list[Json], sources: Counter[str]) -> Json:
    """The shards' means, weighted by their rows; a missing key means a run from before it was stored."""
    weighted = [(i[key][source] * i["n_by_source"][source], source) for i in infos for source in i.get(key, {})]
    measured = {source for _, source in weighted}
    return {
        source: sum(v for v, s in weighted if s == source) / n for source, n in sources.items() if source in measured
    }


def _unextracted(infos: list[Json]) -> Json:
    """Not known if a shard is from before it was stored."""
    if any("unextracted_by_source" not in i for i in infos):
        return {}
    found: Counter[str] = Counter()
    for info in infos:
        # not by adding counters, which drops zeros
        found.update(info["unextracted_by_source"])
    return dict(found)


def _loading(infos: list[Json]) -> Json:
    """The maximum over the shards, not known if one of an older commit lacks it; ratios of merged times have no
    interval."""
    known = ("first_seconds", "load_seconds", "capture_seconds", "graphs", "graph_bytes")
    most = {key: max((i[key] for i in infos if i.get(key) is not None), default=None) for key in known}
    unsteady = "; ".join(dict.fromkeys(i["unsteady"] for i in infos if i.get("unsteady"))) or None
    steady = False if unsteady else True if all(i.get("steady") for i in infos) else None
    return most | {
        "steady": steady,
        "unsteady": unsteady,
        "interval_over_standard": None,
        "interval_over_vanilla": None,
    }


def _speed(infos: list[Json], tokens: int) -> Json:
    unknown = dict.fromkeys(
        (
            "seconds",
            "tokens_per_second",
            "relative_error",
            "forwards",
            "ms_per_forward",
            "latency_p50",
            "latency_p95",
        )
    )
    if any(info["resumed"] for info in infos):
        return unknown | {"rounds": 0}
    slowest = max(info["seconds"] for info in infos)
    forwards = sum(info["forwards"] for info in infos)
    return unknown | {
        "seconds": slowest,
        "tokens_per_second": tokens / slowest,
        "forwards": forwards,
        "ms_per_forward": 1000 * sum(info["seconds"] for info in infos) / forwards,
        "rounds": min(info["rounds"] for info in infos),
    }
