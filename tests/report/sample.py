"""Files such as pytest-benchmark writes for the suite, with invented figures, for the tests of the report."""

import json
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

# what a source's accuracy is above or below the whole's
SOURCES = {"gsm8k": 0.06, "math500": 0.2, "mmlu": -0.02, "longbench_hotpotqa": -0.24}
# tokens/s and right answers of 200 at block length 32
MODES = {
    "vanilla_llada": (21.4, 152),
    "vanilla": (24.9, 151),
    "prefix_cache": (71.2, 149),
    "dual_cache": (98.6, 143),
    "block": (131.5, 139),
    "block_refresh": (127.3, 146),
}
RULES = {"low_confidence": (1.0, 0, 0.0), "threshold": (6.2, -6, 0.9), "entropy": (5.1, -3, 0.15)}

LOSS = {"n": 200, "lost": 9, "won": 4, "loss": 0.025, "loss_at_least": -0.007, "loss_at_most": 0.06, "mcnemar_p": 0.27}


def info(mode: str, block_length: int = 32, rule: str = "low_confidence", **changed: Any) -> dict[str, Any]:
    """One configuration's extra_info."""
    speed, correct = MODES[mode]
    factor, lost, value = RULES[rule]
    speed *= factor * (1 + (32 - block_length) / 90)
    correct += lost + (32 - block_length) // 12
    steps = None if rule != "low_confidence" else 128 if mode == "vanilla_llada" else block_length
    tokens, nfe = 14_210, round(15_360 / factor)
    shares = {source: min(1.0, correct / 200 + offset) for source, offset in SOURCES.items()}
    return {
        "model": "example/llada-8b",
        "load_format": "auto",
        "weights": "checkpoint",
        "dtype": "bfloat16",
        "device": "cuda",
        "gpu": "NVIDIA H200",
        "cpu_threads": 16,
        "torch": "2.13.0",
        "cuda": "13.0",
        "transformers": "5.23.0",
        "python": "3.11.7",
        "commit": "0123456789ab",
        "dataset": "rows.jsonl",
        "dataset_revisions": [],
        "grader_versions": dict.fromkeys(SOURCES, 2),
        "prompts_version": 1,
        "n": 200,
        "shard": None,
        "rows": [[f"row-{i}", 71, 77, i < correct] for i in range(200)],
        "tokens": tokens,
        "tokens_per_second": speed,
        "steps": nfe,
        "nfe": nfe,
        "tokens_per_forward": tokens / nfe,
        "ms_per_forward": 1000 * tokens / speed / nfe * 8,
        "seconds": tokens / speed,
        "rounds": 3,
        "relative_error": 0.004,
        "resumed": 0,
        "latency_p50": 610 / speed,
        "latency_p95": 980 / speed,
        "accuracy": correct / 200,
        "accuracy_interval": [correct / 200 - 0.06, correct / 200 + 0.057],
        "accuracy_by_source": shares,
        "n_by_source": dict.fromkeys(SOURCES, 50),
        "against_vanilla": None if mode == "vanilla" else LOSS,
        "prompts_truncated": 3,
        "mode": mode,
        "unmasking": rule,
        "block_length": 128 if mode == "vanilla_llada" else block_length,
        "denoising_steps": steps,
        "rule_value": value,
        "max_tokens": 128,
        "temperature": 0.0,
        "ignore_eos": False,
        "batch_size": 32,
    } | changed


def results(infos: list[dict[str, Any]], day: int = 0) -> dict[str, Any]:
    """The file's content, written `day` days after the first of March 2026."""
    benchmarks = [
        {
            "group": "throughput",
            "name": f"test_throughput[{i['mode']}-{i['block_length']}-{i['unmasking']}]",
            "params": {"mode": i["mode"], "block_length": min(32, i["block_length"]), "unmasking": i["unmasking"]},
            "extra_info": i,
            "stats": {"median": i["seconds"]},
        }
        for i in infos
    ]
    when = datetime(2026, 3, 1, 9, 30, tzinfo=UTC) + timedelta(days=day)
    return {"machine_info": {}, "commit_info": {"id": "f" * 40}, "datetime": when.isoformat(), "benchmarks": benchmarks}


def answers(one: dict[str, Any], **changed: Any) -> list[dict[str, Any]]:
    """What --samples would hold of a configuration's rows."""
    case = {key: one[key] for key in ("mode", "unmasking")} | {"block_length": min(32, one["block_length"])}
    return [
        {"id": row_id, "source": list(SOURCES)[i % 4], **case}
        | {"prompt": f"How many are {i}?", "text": f"{one['mode']} says {i}.\n" * (1 + i % 7), "gold": f"gold-{i}"}
        | {"extracted": f"{one['mode']}-{i}", "correct": right, "score": float(right), "finish_reason": "stop"}
        | {"tokens": tokens, "forwards": forwards}
        | changed
        for i, (row_id, tokens, forwards, right) in enumerate(one["rows"])
    ]


def lines(*found: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for many in found for one in many)


def write(path, content: Any):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_run(folder, lengths=(32,), rules=("low_confidence",), earlier: int = 3) -> list[str]:
    """The files of one report: every mode at the lengths and rules, and `earlier` runs before it, each a bit slower."""
    cases = [c for c in product(MODES, lengths, rules) if c[0] != "vanilla_llada" or c[1] == lengths[0]]
    paths = [write(folder / "out.json", results([info(*case) for case in cases], day=earlier))]
    for day in range(earlier):
        past = [info(*case, commit=f"{day:x}{'a5c3e1d7f90b'[1:]}{'+' * (day % 2)}") for case in cases]
        for one in past:
            one["tokens_per_second"] *= 0.97 ** (earlier - day) * (1 + 0.02 * (-1) ** day)
        paths.append(write(folder / f"run-{day}.json", results(past, day)))
    return [str(path) for path in paths]
