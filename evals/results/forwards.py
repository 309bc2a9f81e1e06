"""Whether a configuration takes more forwards than before."""

from evals.runs.configurations import SCHEDULED

# The share by which the forwards of the other rules may rise: rounding may move a confidence over the rule's bound. A
# schedule does not depend on rounding.
NFE_TOLERANCE = 0.01


def nfe_fault(unmasking: str, before: int, after: int) -> str | None:
    """What is wrong with `after` forwards compared with `before`; None if nothing is."""
    scheduled = unmasking in SCHEDULED
    if after <= (before if scheduled else before * (1 + NFE_TOLERANCE)):
        return None
    allowed = "none more is allowed" if scheduled else f"{NFE_TOLERANCE:.0%} more is allowed"
    return f"{after} forwards where there were {before} ({after / before - 1:+.1%}), and {allowed}"
