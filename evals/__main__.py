"""One entry point for the suite's commands: `python -m evals COMMAND ...`."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from evals.gate.exits import FAILED, run_command

# The command, the module whose `main` it runs, what it does.
COMMANDS = {
    "compare": ("evals.results.compare", "whether a run is worse than an earlier one"),
    "merge": ("evals.results.merge", "the files of a run's shards as the file of one run"),
    "report": ("evals.report.command", "an HTML page about a run, and earlier ones"),
    "gate": ("evals.gate.command", "whether this checkout decodes more slowly than a commit"),
    "gate-experiment": ("evals.gate.experiment", "how often the gate alarms at a known slowdown"),
    "build-sample": ("evals.questions.build_sample", "draw rows of the public test sets"),
    "lm-eval": ("evals.lm_eval.command", "lm-eval's tasks on this engine"),
    "stages": ("evals.timing.stages", "where the milliseconds of a step go on a GPU"),
    "rounding": ("evals.timing.rounding", "how far fp8 moves a shape's logits, by its layers"),
    "study": ("evals.llada_tiny.study", "what modes and rules cost the small model in accuracy"),
    "quantized-loss": ("evals.llada_tiny.quantized", "what fp8 costs the small model in accuracy"),
    "train-tiny": ("evals.llada_tiny.train", "train the small model"),
    "evaluate-tiny": ("evals.llada_tiny.evaluate", "its accuracy on held-out problems"),
    "sample-tiny": ("evals.llada_tiny.sample", "write held-out problems of its kinds: sample_200.jsonl, or others"),
    "tokenizer-tiny": ("evals.llada_tiny.tokenizer", "write its tokenizer"),
}


def usage() -> str:
    lines = ["usage: python -m evals COMMAND ...", "", "the suite itself is `pytest evals/`; beside it there are:"]
    lines += [f"  {name:<16}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join([*lines, "", "`python -m evals COMMAND --help` tells its options"])


def main(argv: Sequence[str] | None = None) -> int | None:
    """-> the command's exit code; 2 if there is no such command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else FAILED
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"python -m evals: no command is called {name!r}; {hint}", file=sys.stderr)
        return FAILED
    # a command's packages, torch among them, are imported only when it is called
    return import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    run_command(main)
