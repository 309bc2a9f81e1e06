"""lm-eval's command line. It finds models by name among those imported, so this imports ours first."""

import sys

from evals.lm_eval.options import BadArguments


def main(arguments: list[str] | None = None) -> int:
    """Runs lm-eval's command with these arguments, by default the process's -> exit code: 2 for bad usage."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        print(f"blockinfer: lm-eval is not installed ({error}): pip install 'blockinfer[lm-eval]'", file=sys.stderr)
        return 2
    import evals.lm_eval.adapter  # noqa: F401 - registers the model

    former = sys.argv
    try:
        sys.argv = ["lm-eval", *(former[1:] if arguments is None else arguments)]
        cli_evaluate()
    except BadArguments as error:
        print(f"blockinfer: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        # lm-eval's own error for names of --tasks; any other is a bug, and its traceback is shown
        if not str(error).startswith("Tasks not found"):
            raise
        hint = "`python -m evals lm-eval ls tasks` lists those there are; --include_path adds a folder's"
        print(f"lm-eval: {error}; {hint}", file=sys.stderr)
        return 2
    finally:
        sys.argv = former
    return 0
