"""What tests and evals share: the environment, and the options of the suite in evals/."""

import argparse
import os
from itertools import pairwise

# Before torch is imported: with one of two cores busy, two spinning OpenMP threads were measured 47 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# When each core runs a test of its own, threads would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from evals.files import number_argument, text_argument
from evals.runs.git import git_environment

# Before triton is imported: without a GPU, its interpreter runs the kernels' tests.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before a test or pytest-benchmark calls git: inside a git hook it would see the hook's repository and index.
for variable in os.environ.keys() - git_environment().keys():
    del os.environ[variable]


def _comma_list(item):
    def items(text):
        values = [item(part.strip()) for part in text.split(",") if part.strip()]
        if not values:
            raise argparse.ArgumentTypeError(f"must be a comma list of at least one value, got {text!r}")
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"names a value twice: {text!r}")
        return values

    return items


def _shard(text):
    index, slash, of = text.partition("/")
    if not slash or not index.isdecimal() or not of.isdecimal() or not 1 <= int(index) <= int(of):
        raise argparse.ArgumentTypeError(f"must be i/n with i from 1 to n, got {text!r}")
    return int(index), int(of)


def pytest_addoption(parser):
    group = parser.getgroup("blockinfer", "BlockInfer's suite (read by evals/ alone)")
    add = group.addoption
    share = number_argument(0, float, 1)
    add("--dataset", type=text_argument, help="rows to evaluate, a .jsonl file (sample_200.jsonl)")
    prompt = "a Jinja template over a row's fields, which makes its prompt (evals/questions/prompts.py)"
    add("--prompt", type=text_argument, metavar="FILE", help=prompt)
    add("--num-samples", type=number_argument(1), help="evaluate the first N rows (32 on a CPU, all on a GPU)")
    add("--skip-sample", type=number_argument(0), default=0, help="leave out the first N rows (0)")
    add("--shard", type=_shard, help="i/n: of these rows the i-th of n parts, from 1/n to n/n (all)")
    add("--source", type=_comma_list(str), help="rows of these sources only, a comma list (all)")
    add("--max-tokens", type=number_argument(1), default=128, help="new tokens per row (128)")
    add("--block-length", type=_comma_list(number_argument(1)), default=[32], help="block lengths, a comma list (32)")
    add("--denoising-steps", type=number_argument(1), help="steps per block (32; no limit at rules without a schedule)")
    add("--mode", type=_comma_list(str), help="decoding modes, a comma list (all); vanilla_llada is one of them")
    add("--unmasking", type=_comma_list(str), help="unmasking rules, a comma list or 'all' (low_confidence)")
    add("--threshold", type=share, help="of the rule threshold (0.9), or scheduled_threshold (0.95)")
    add("--factor", type=number_argument(0, float), help="of the rule factor (1)")
    add("--entropy-bound", type=number_argument(0, float), help="of the rule entropy, nats (0.15)")
    add("--entropy-threshold", type=number_argument(0, float), help="of the rule entropy_threshold, nats (0.5)")
    opens = "the next block opens once this share of the last one is revealed; vanilla_llada is one block still (1)"
    add("--block-add-threshold", type=share, help=opens)
    active = "that block takes scheduled or limited steps once this share is; read with --block-add-threshold alone (1)"
    add("--decoded-token-threshold", type=share, help=active)
    suffix = "masks kept behind the open blocks in block and block_refresh; other modes keep all (0)"
    add("--suffix-window", type=number_argument(0), help=suffix)
    delay = "steps for which a finished block waits for its commit in block; other modes commit none (0)"
    add("--commit-delay", type=number_argument(0), help=delay)
    edits = "a token of the open block is replaced where another is likelier than this; not in vanilla_llada (never)"
    add("--editing-threshold", type=share, help=edits)
    after = "editing ends at most so many steps after a block's last mask; read with --editing-threshold alone (16)"
    add("--max-post-steps", type=number_argument(0), help=after)
    add("--skip-vanilla", action="store_true", help="leave out the uncached baselines vanilla_llada and vanilla")
    model = "checkpoint folder, Hub name, or shape (LLaDA-8B-Instruct on a GPU, evals/llada_tiny on a CPU)"
    add("--model", type=text_argument, help=model)
    add("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights, speed only (auto)")
    tokenizer = "tokenizer folder or Hub name (the model's; with dummy weights the small model's)"
    add("--tokenizer", type=text_argument, help=tokenizer)
    add("--dtype", type=text_argument, default="auto", help="auto, float32, bfloat16, float16 or float64 (auto)")
    add("--quantization", choices=["fp8"], help="fp8: the layers' matrices in FP8 (what the checkpoint is stored in)")
    add("--device", type=text_argument, default="auto", help="auto, cpu or cuda (auto)")
    ranks = "GPUs that share the model, on a CPU processes (1)"
    add("--tensor-parallel-size", type=number_argument(1), default=1, metavar="N", help=ranks)
    add("--batch-size", type=number_argument(1), help="requests at once (8 on a CPU, 32 on a GPU)")
    add("--reference-impl", action="store_true", help="time the checkpoint's own modelling code too, without a cache")
    add("--trust-remote-code", action="store_true", help="let --reference-impl run the code that the checkpoint brings")
    add(
        "--max-seconds",
        type=number_argument(0, float),
        help="repeat each timed run for so long at most (0 on a CPU, 60 on a GPU)",
    )
    add(
        "--relative-error",
        type=number_argument(0, float),
        default=0.01,
        help="or until its mean is known so well (0.01)",
    )
    add("--steps-and-kernels", action="store_true", help="on a CPU too, small, to see that they run (on a GPU always)")
    mmlu = "likelihood: answer mmlu's rows by the likelihood of the letter too, beside generation (generation)"
    add("--mmlu", choices=["generation", "likelihood"], default="generation", help=mmlu)
    add(
        "--max-accuracy-loss",
        type=number_argument(0, float),
        default=3.0,
        help="points that a mode may lose to vanilla (3)",
    )
    resume = "a .jsonl file that keeps every generation; the same command again goes on from it (none)"
    add("--resume", type=text_argument, help=resume)
    samples = "every answer with its prompt, gold and grade, /dev/null for nowhere (samples.jsonl beside the results)"
    add("--samples", type=text_argument, help=samples)
    output = "where the comparison is written, /dev/null for nowhere (benchmark_results.json)"
    add("--output", type=text_argument, default="benchmark_results.json", help=output)


# Options of pytest-benchmark that take the next word as their value, even if it is a folder of tests.
_MAY_SWALLOW = ("--benchmark-compare", "--benchmark-histogram", "--benchmark-cprofile-dump", "--benchmark-netrc")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Refuses arguments that pytest-benchmark would take as an option's value; without a folder, pytest would run
    tests/."""
    given = [str(argument) for argument in config.invocation_params.args]
    for option, value in pairwise(given):
        path = value.partition("::")[0]
        if option in _MAY_SWALLOW and (os.path.isdir(path) or (path.endswith(".py") and os.path.isfile(path))):
            meant = "" if option == "--benchmark-compare" else f", or write {option}={value} where that is meant"
            raise pytest.UsageError(f"{option} takes {value!r} for its own value: give {value} before it{meant}")
    compared, storage = config.getoption("benchmark_compare", None), config.getoption("benchmark_storage", None)
    if isinstance(compared, str) and os.path.isdir(compared):
        raise pytest.UsageError(f"--benchmark-compare: {compared!r} is a folder; name a file of --benchmark-json")
    for option, value in (("--benchmark-compare", compared), ("--benchmark-storage", storage)):
        if isinstance(value, str) and not value.strip():
            raise pytest.UsageError(f"{option} must not be empty")
