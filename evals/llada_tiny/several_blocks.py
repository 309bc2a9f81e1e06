"""The cost of opening blocks early: each rule with one block at a time and with several open, on the same problems."""

from blockinfer.decoding.modes import DROP_SUFFIX, MAY_DELAY
from blockinfer.decoding.unmasking import RULES
from evals.llada_tiny.measured import ONE_BLOCK, Result, table_row
from evals.results.aup import scores

_EARLY = (0.5, 0.1)
_SUFFIXES = (8, 32)  # masks


def plan(mode: str, block_length: int) -> list[tuple[dict, dict]]:
    """(options of the rule, options of the window) of each configuration; for each rule one block at a time first.

    The schedule of low_confidence reveals two tokens a step and block. Only the modes that drop the suffix are measured
    with one kept, and only those that may delay a commit with a delay.
    """
    rules: list[dict] = [
        {"unmasking": "threshold", "threshold": 0.9},
        *({"unmasking": "entropy_threshold", "entropy_threshold": value} for value in (0.1, 0.5)),
        {"unmasking": "low_confidence", "denoising_steps": max(1, block_length // 2)},
    ]
    return [(rule, window) for rule in rules for window in _windows(mode, RULES[rule["unmasking"]].has_schedule)]


def _windows(mode: str, has_schedule: bool) -> list[dict]:
    def opened(share: float) -> dict:
        # only a schedule asks whether a block is active
        return {"block_add_threshold": share} | ({"decoded_token_threshold": share} if has_schedule else {})

    windows = [{}, *map(opened, _EARLY)]
    if mode in DROP_SUFFIX:
        windows += [window | {"suffix_window": w} for window in ({}, opened(0.5)) for w in _SUFFIXES]
    if mode in MAY_DELAY:
        windows.append(opened(0.5) | {"commit_delay": 2})
    return windows


def document(results: list[Result], rows: int) -> str:
    """study.md: AUP, and for each block length a table of all configurations."""
    parts = [
        f"Several blocks open at once, {rows} held-out problems of each source. `add`: block_add_threshold, and with "
        "low_confidence decoded_token_threshold too; `suffix`: suffix_window; `delay`: commit_delay.",
        "AUP (evals/results/aup.py) over the rules, with the best accuracy of all:",
        _scores(results),
    ]
    for length in dict.fromkeys(r.block_length for r in results):
        parts += [
            f"Block length {length}. Right answers in per cent, tokens per forward; against one block at a time, of "
            "the same mode and rule on the same problems: forwards, points lost, answers lost and won, McNemar's p.",
            _table([r for r in results if r.block_length == length]),
        ]
    return "\n\n".join(parts) + "\n"


def _scores(results: list[Result]) -> str:
    """A row for each mode and block length, a column for each window; empty if only one rule was measured."""
    found = scores(((r.mode, r.block_length, r.window), (r.tokens_per_forward, 100 * r.accuracy)) for r in results)
    windows = list(dict.fromkeys(r.window for r in results))
    lines = [table_row(["mode", "block length", *windows]), table_row(["---"] * (2 + len(windows)))]
    for mode, length in dict.fromkeys((r.mode, r.block_length) for r in results):
        cells = [f"{found[key][0]:,.0f}" if (key := (mode, length, w)) in found else "" for w in windows]
        lines.append(table_row([f"`{mode}`", str(length), *cells]))
    return "\n".join(lines)


def _table(results: list[Result]) -> str:
    head = ["mode", "rule", "window", "right", "tokens per forward", "of `gsm8k` and `math500`", "forwards", "lost"]
    one = {(r.mode, r.rule): r for r in results if r.window == ONE_BLOCK}
    lines = [table_row(head), table_row(["---"] * len(head))]
    for r in results:
        figures = [f"{100 * r.accuracy:.1f}", f"{r.tokens_per_forward:.2f}", f"{r.long_tokens_per_forward:.2f}"]
        against = _against(r, one[r.mode, r.rule]) if r.window != ONE_BLOCK else [f"{r.forwards:,}", ""]
        lines.append(table_row([f"`{r.mode}`", r.rule, r.window, *figures, *against]))
    return "\n".join(lines)


def _against(r: Result, one: Result) -> list[str]:
    paired = r.against(one)
    p = paired.mcnemar()
    lost = f"{100 * paired.loss:.1f} ({paired.lost}, {paired.won}), p {p:.2g}" if paired.lost + paired.won else "0.0"
    return [f"x {r.forwards / one.forwards:.2f}", lost]
