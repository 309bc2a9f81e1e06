"""Reads log-probabilities of scored rows from their logits, outside a step's captured functions."""

from collections.abc import Callable

import numpy as np
import torch

from blockinfer.engine.batch import lane_rows
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.scoring import Scores, ScoringRow
from blockinfer.engine.transfer import on_device
from blockinfer.kernels.guidance import Guidance
from blockinfer.kernels.log_probability import log_probability

# Rows whose logits exist at once; bounds their memory.
_ROWS = 256


class ScoreReader:
    """logits: of rows [N] of the last forward. padded: from a number of rows to the number to pad them to. size: of the
    vocabulary. wait: called with a device event before the host synchronizes with it."""

    def __init__(
        self,
        logits: Callable[[torch.Tensor, Guidance | None], torch.Tensor],
        padded: Callable[[int], int],
        size: int,
        device: torch.device,
        wait: Callable[[torch.cuda.Event], None],
    ) -> None:
        self._logits = logits
        self._padded = padded
        self._size = size
        self._device = device
        self._wait = wait

    def read(self, scheduled: list[ScheduledSequence]) -> Scores:
        """The scores of the rows just run, at least one; does not wait for the values."""
        scored, rows, token_ids, shifts, scales = [], [], [], [], []
        for (sequence, plan), own in zip(scheduled, lane_rows(scheduled), strict=True):
            if isinstance(sequence, ScoringRow):
                scored.append(sequence)
                rows += [own.stop - plan.segments[-1].stop + position for position, _ in sequence.reads]
                token_ids += [token_id for _, token_id in sequence.reads]
                shifts += [len(own) if sequence.guided else 0] * len(sequence.reads)
                scales += [sequence.cfg_scale] * len(sequence.reads)
        values = self.log_probabilities(rows, token_ids, (shifts, scales) if any(scales) else None)
        if self._device.type != "cuda":
            return Scores(scored, values.tolist)
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def read() -> list[float]:
            self._wait(arrived)
            arrived.synchronize()
            return on_host.tolist()

        return Scores(scored, read)

    def log_probabilities(
        self, rows: list[int], token_ids: list[int], guidance: tuple[list[int], list[float]] | None
    ) -> torch.Tensor:
        """rows of the forward, their token_ids, and guidance as shifts and scales -> [N] float64."""
        chunks = []
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            number = len(rows[part])
            # padded to a captured size, whose kernels are compiled
            filler = [0] * (self._padded(number) - number)
            columns = [rows[part], token_ids[part], *(column[part] for column in guidance or ())]
            chunk, tokens, *guiding = (on_device(np.array(column + filler), self._device) for column in columns)
            logits = self._logits(chunk, Guidance(*guiding) if guiding else None)
            chunks.append(log_probability(logits, tokens, self._size)[:number])
        return torch.cat(chunks)
