"""Likelihoods as requests: each mask of an answer is one forward, batched with other requests."""

import math
from collections.abc import Callable

from blockinfer.decoding.likelihood import SCORING_MODES, Mask
from blockinfer.decoding.modes import BlockState, Segment
from blockinfer.engine.resident import Resident


class ScoringRow(Resident):
    """A canvas with some positions masked, and the log-probabilities to read there.

    token_ids: the whole canvas, shared between siblings. answer: its positions. The others are given, and hidden from a
    shadow; those before the answer are the prompt. masked: positions that hold the mask token. reads: (position, token
    id) pairs whose log-probabilities go to `values`.
    """

    def __init__(
        self,
        request_id: int,
        token_ids: list[int],
        answer: range,
        masked: Mask,
        reads: list[tuple[int, int]],
        mode: str,
        cfg_scale: float,
        siblings: "list[ScoringRow]",
    ) -> None:
        super().__init__(request_id, siblings)
        self._token_ids = token_ids
        self._answer = answer
        self._masked = frozenset(masked)
        self.reads = reads
        self.mode = mode
        self.cfg_scale = cfg_scale
        self.guided = cfg_scale > 0
        self.prompt_len = answer.start
        self.canvas_end = len(token_ids)
        self.values: list[float] | None = None

    def known_token_ids(self) -> list[int | None]:
        """None where masked."""
        return [None if i in self._masked else token for i, token in enumerate(self._token_ids)]

    def shadow_token_ids(self) -> list[int | None]:
        return [token if i in self._answer else None for i, token in enumerate(self.known_token_ids())]

    def _segments(self) -> list[Segment]:
        length = len(self._token_ids)
        state = BlockState(self.prompt_len, length, length, self.prompt_len, length, length, 0, self.num_cached)
        return SCORING_MODES[self.mode](state)

    def launched(self) -> None:
        """After its forward was launched: siblings that share its prompt pages may read them."""
        self.num_cached = self.prompt_len
        self.prompt_source = None

    def is_finished(self) -> bool:
        return self.values is not None


class Scores:
    """The values of a step's rows, possibly still being copied from the device."""

    def __init__(self, rows: list[ScoringRow], read: Callable[[], list[float]]) -> None:
        self.rows = rows
        self._read = read

    def collect(self) -> None:
        """Waits for the values and gives each row its own."""
        values = self._read()
        for row in self.rows:
            row.values, values = values[: len(row.reads)], values[len(row.reads) :]
            row.broken = any(math.isnan(value) for value in row.values)
