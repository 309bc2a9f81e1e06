"""`python -m evals.gate`: see command.py."""

from collections.abc import Sequence

from evals.gate.exits import run_command


def main(argv: Sequence[str] | None = None) -> int:
    # inside run_command: a checkout whose modules cannot be imported has no verdict either
    from evals.gate import command

    return command.main(argv)


if __name__ == "__main__":
    run_command(main)
