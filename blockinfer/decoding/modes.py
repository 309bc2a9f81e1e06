"""Decoding modes: what each denoising step recomputes, as segments.

A segment is a run of query positions of one sequence that attend to the first `kv_len` keys of that sequence. A forward
writes the K and V of all its queries to their pages before it attends, so its segments see each other's K and V as far
as their kv_len reaches. A mode is a pure function from a sequence's state to its next segments.

The state includes a window of open blocks; with one block at a time the window is that block. Its start moves when its
first block is finished, its end when a block opens (`decoding.windows`).
"""

from collections.abc import Callable
from typing import NamedTuple


class Segment(NamedTuple):
    """Queries at positions start..stop-1, attending without a causal mask to positions 0..kv_len-1."""

    start: int
    stop: int
    kv_len: int


class BlockState(NamedTuple):
    """A sequence's state; positions count from the prompt's first token.

    prompt_len: the first generated position. canvas_end: one past the last. [block_start, block_end): the window, which
    is the block being denoised, or all blocks open at once. suffix_end: one past the last mask that the window sees if
    the suffix is dropped, at least block_end. step: steps made since the window's start last moved. num_cached: leading
    positions whose K/V in the pages is final.
    """

    prompt_len: int
    block_length: int
    canvas_end: int
    block_start: int
    block_end: int
    suffix_end: int
    step: int
    num_cached: int


Mode = Callable[[BlockState], list[Segment]]


def vanilla(state: BlockState) -> list[Segment]:
    """The whole canvas in every step; exact (LLaDA, arXiv 2502.09992, semi-autoregressive)."""
    return [Segment(0, state.canvas_end, state.canvas_end)]


def prefix_cache(state: BlockState) -> list[Segment]:
    """The K/V before the window is reused until it moves (Fast-dLLM's prefix cache, arXiv 2505.22618, section 3.2)."""
    start = 0 if state.step == 0 else state.block_start
    return [Segment(start, state.canvas_end, state.canvas_end)]


def dual_cache(state: BlockState) -> list[Segment]:
    """The K/V before the window, and of the masks after it, is reused until it moves (Fast-dLLM's dual cache)."""
    if state.step == 0:
        return [Segment(0, state.canvas_end, state.canvas_end)]
    return [Segment(state.block_start, state.block_end, state.canvas_end)]


def block(state: BlockState) -> list[Segment]:
    """The suffix is dropped and committed K/V is never recomputed: each block sees the prompt and earlier blocks.

    What is not cached yet is computed in the window's first step: the prompt, the blocks just finished or, after a
    preemption, all of them. Each has kv_len at its own end, as if computed when it was finished.
    """
    return _commits(state) + [Segment(state.block_start, state.suffix_end, state.suffix_end)]


def _commits(state: BlockState) -> list[Segment]:
    segments = []
    start = state.num_cached
    while start < state.block_start:
        stop = state.prompt_len if start < state.prompt_len else start + state.block_length
        segments.append(Segment(start, stop, stop))
        start = stop
    return segments


def block_refresh(state: BlockState) -> list[Segment]:
    """The suffix is dropped; all K/V before the window is recomputed when it moves, then reused."""
    start = 0 if state.step == 0 else state.block_start
    return [Segment(start, state.suffix_end, state.suffix_end)]


MODES: dict[str, Mode] = {
    "vanilla": vanilla,
    "prefix_cache": prefix_cache,
    "dual_cache": dual_cache,
    "block": block,
    "block_refresh": block_refresh,
}

# Modes in which the prompt's K and V depend on the prompt alone, so that several answers can share them.
PROMPT_ALONE = frozenset({"block"})

# Modes that see the whole canvas, so that text may follow the masks.
SEE_SUFFIX = ("vanilla", "prefix_cache", "dual_cache")

# Modes that drop what follows the window, except for the masks that suffix_window keeps.
DROP_SUFFIX = ("block", "block_refresh")

# Modes that can keep a finished block in the window for a while, and commit it once it leaves.
MAY_DELAY = ("block",)
