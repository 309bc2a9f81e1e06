"""When a configuration takes more forwards than it did."""

from evals.runs.configurations import SCHEDULED

# The share by which the forwards of the other rules may rise: rounding may move a confidence over its bound. A schedule
# leaves nothing to round.
NFE_TOLERANCE = 0.01


def nfe_fault(unmasking: str, before: int, after: int) -> str | None:
    """What is wrong with `after` forwards where there were `before`; None where nothing is."""
    scheduled = unmasking in SCHEDULED
    if after <= (before if scheduled else before * (1 + NFE_TOLERANCE)):
        return None
    allowed = "none more is allowed" if scheduled else f"{NFE_TOLERANCE:.0%} more is allowed"
    return f"{after} forwards where there were {before} ({after / before - 1:+.1%}), and {allowed}"
