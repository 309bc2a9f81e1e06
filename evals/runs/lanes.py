"""Configurations side by side: each runs a part at a time, so that whatever slows the machine slows all of them.

On a shared machine, the load changes between runs of minutes: ratios of such times were seen to move by more than half
from hour to hour. In turns of seconds all runs share the same load.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from blockinfer import LLM, RequestOutput, SamplingParams
from blockinfer.engine.engine import Engine
from evals.runs.rounds import Round

# Parts of a round: with the default rows a few steps each. Fewer were seen to leave the ratios twice as uncertain.
PARTS = 128


class Lane:
    """One configuration's round over its prompts, which can pause between two steps: on an engine of its own with the
    weights of `llm`, so that only the time at which a step runs differs from `llm.generate`.

    outputs: in the order of the prompts, once all is done. The seconds in their metrics, like the round's, count only
    the time in which this lane ran.
    """

    def __init__(
        self,
        llm: LLM,
        prompts: Sequence[dict[str, Any]],
        params: SamplingParams,
        on_finish: Callable[[RequestOutput], None],
    ) -> None:
        self._engine = Engine(llm.engine.model, llm.config, llm.tokenizer)
        self._on_finish = on_finish
        self._turns: list[tuple[float, float]] = []
        self._added = time.perf_counter()
        self._finished = {self._engine.add_request(prompt, params): None for prompt in prompts}
        self._positions = params.max_tokens * len(prompts)
        self._positions_finished = 0

    @property
    def outputs(self) -> list[RequestOutput]:
        return list(self._finished.values())

    @property
    def round(self) -> Round:
        parts = tuple(end - begin for begin, end in self._turns)
        return Round(sum(parts), self._engine.runner.stats.forwards, parts=parts)

    def go_on(self, share: float) -> None:
        """Runs until this share of the positions to fill is filled; 1 means all of them."""
        begin = time.perf_counter()
        self._turns.append((begin, math.inf))
        # an answer without masks may still be edited
        while self._engine.has_unfinished() and (share == 1 or self._share_filled() < share):
            for output in self._engine.step():
                output = self._in_own_time(output)
                self._finished[output.request_id] = output
                self._positions_finished += self._positions // len(self._finished)
                self._on_finish(output)
        self._turns[-1] = begin, time.perf_counter()

    def _share_filled(self) -> float:
        """An answer that a stop token ended counts as filled."""
        running = sum(s.block_end - s.prompt_len - s.num_masked for s in self._engine.scheduler.running)
        return (self._positions_finished + running) / self._positions

    def _in_own_time(self, output: RequestOutput) -> RequestOutput:
        names = ("queued_seconds", "first_block_seconds", "total_seconds")
        own = {name: self._own(getattr(output.metrics, name)) for name in names}
        return dataclasses.replace(output, metrics=dataclasses.replace(output.metrics, **own))

    def _own(self, seconds: float) -> float:
        """Of the first seconds since the requests were added, those in which this lane ran."""
        until = self._added + seconds
        return sum(min(end, until) - begin for begin, end in self._turns if begin < until)


def side_by_side(lanes: Sequence[Lane]) -> dict[Lane, Exception]:
    """Runs all to their ends, a part of each at a time; a lane that raises is dropped, and its exception returned."""
    failed: dict[Lane, Exception] = {}
    for part in range(1, PARTS + 1):
        # there and back again: a machine that slows down steadily favours none
        for lane in lanes if part % 2 else lanes[::-1]:
            if lane not in failed:
                try:
                    lane.go_on(part / PARTS)
                except Exception as error:
                    failed[lane] = error
    return failed
