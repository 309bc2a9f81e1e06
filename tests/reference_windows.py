"""Decoding with several blocks open at once, plain: one request at a time, every forward written out.

What a step reveals and what it computes are written from their meaning, on the model, the noise and the rules of
`tests.reference`. A request's state is a *window*: the blocks from the first that is not finished (or, in `block`, was
finished less than `commit_delay` steps ago) to the last open one.
"""

from dataclasses import dataclass

import torch

from tests import reference
from tests.reference import (
    COUNTED,
    STATIC,
    Guided,
    Prediction,
    Reference,
    Result,
    Settings,
    Step,
    by_rank,
    cut,
    log_distribution,
    predict,
    quota_at,
    reveal,
    step_limit,
)


class Vanilla(reference.Vanilla):
    """Every step sees the whole canvas and recomputes all of it."""

    def logits(self, canvas: list[int], start: int, end: int, suffix_end: int) -> torch.Tensor:
        """Logits of the window [start, end) in one step; up to suffix_end masks behind it are kept."""
        hidden, _ = self.model.forward(canvas)
        return self.model.head(hidden[start:end])


class Refreshed(Vanilla):
    """The first step of all, and the first after the window's start has moved, is a refresh."""

    def __init__(self, model: Reference, prompt_ids: list[int]):
        super().__init__(model, prompt_ids)
        self.start: int | None = None

    def logits(self, canvas, start, end, suffix_end):
        refresh, self.start = start != self.start, start
        return self.model.head((self.refreshed if refresh else self.later)(canvas, start, end, suffix_end))


class PrefixCache(Refreshed):
    """A refresh's keys and values before the window serve until the next; the rest is recomputed."""

    def refreshed(self, canvas, start, end, suffix_end):
        hidden, kv = self.model.forward(canvas)
        self.prefix = cut(kv, 0, start)
        return hidden[start:end]

    def later(self, canvas, start, end, suffix_end):
        hidden, _ = self.model.forward(canvas[start:], start, before=self.prefix)
        return hidden[: end - start]


class DualCache(Refreshed):
    """Of each position outside the window its last keys and values: before and after it they are a refresh's."""

    def refreshed(self, canvas, start, end, suffix_end):
        hidden, self.kv = self.model.forward(canvas)
        return hidden[start:end]

    def later(self, canvas, start, end, suffix_end):
        hidden, _ = self.model.forward(canvas[start:end], start, cut(self.kv, 0, start), cut(self.kv, end))
        return hidden


class Block(reference.Block):
    """The prompt alone, each block that has left the window once more on what is before it; both kept for good."""

    def logits(self, canvas, start, end, suffix_end):
        hidden, _ = self.model.forward(canvas[start:suffix_end], start, before=self.committed)
        return self.model.head(hidden[: end - start])


class BlockRefresh(Refreshed):
    """A refresh recomputes all up to the kept suffix; what is before the window serves until the next."""

    def refreshed(self, canvas, start, end, suffix_end):
        hidden, kv = self.model.forward(canvas[:suffix_end])
        self.before = cut(kv, 0, start)
        return hidden[start:end]

    def later(self, canvas, start, end, suffix_end):
        hidden, _ = self.model.forward(canvas[start:suffix_end], start, before=self.before)
        return hidden[: end - start]


MODES = {
    "vanilla": Vanilla,
    "prefix_cache": PrefixCache,
    "dual_cache": DualCache,
    "block": Block,
    "block_refresh": BlockRefresh,
}


@dataclass(frozen=True)
class WindowStep(Step):
    """Also what was open and active in it, by the blocks' numbers, and what the guarantee and the step limits revealed,
    as output positions."""

    open: tuple[int, ...] = ()
    active: tuple[int, ...] = ()
    guaranteed: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()


@dataclass
class OpenBlock:
    """A block that has masks, in one step."""

    masked: list[int]  # canvas positions
    logits: torch.Tensor  # of these, [masked, columns]
    prediction: Prediction  # of these
    quota: int | None  # by its schedule, 0 where it is not active; None where the rule has none
    last: bool  # its step limit is reached


def generate(model: Reference, prompt_ids: list[int], settings: Settings) -> Result:
    window, result = Window(model, prompt_ids, settings), Result(settings)
    while True:
        number = window.finished()
        step = window.step()
        result.blocks += [[] for _ in range(number + 1 - len(result.blocks))]
        result.blocks[number].append(step)
        if ended(result, window):
            return result
        window.open_one_more()


class Window:
    """The state of one request. Blocks are numbered from 0, steps too."""

    def __init__(self, model: Reference, prompt_ids: list[int], settings: Settings):
        self.model, self.settings, self.P = model, settings, len(prompt_ids)
        self.canvas = list(prompt_ids) + [model.config["mask_token_id"]] * settings.max_tokens
        C, L = len(self.canvas), settings.block_length
        self.blocks = [list(range(start, min(start + L, C))) for start in range(self.P, C, L)]
        self.masked = set(range(self.P, C))  # what a prompt's own mask tokens are not
        self.steps = 0
        # of each block that is so: the first step before which it was
        self.opened, self.active, self.done = {0: 0}, {}, {}
        self.left = 0  # blocks that have left the window
        given = set(range(self.P))
        self.mode = Guided(model, MODES[settings.mode], self.canvas, given, self.P, settings.cfg_scale)

    def progress(self, number: int) -> float:
        block = self.blocks[number]
        return sum(i not in self.masked for i in block) / len(block)

    def finished(self) -> int:
        """How many blocks, from the first on, have no mask."""
        return next((n for n in range(len(self.blocks)) if self.progress(n) < 1), len(self.blocks))

    def step(self) -> WindowStep:
        """One forward, and what it reveals."""
        self.activate()
        self.leave()
        logits = self.window_logits()
        unfinished = [number for number in self.opened if number >= self.finished()]
        ready = [self.look(number, logits) for number in unfinished if self.progress(number) < 1]
        chosen, margin, guaranteed, forced = choose(ready, self.settings)
        positions = [i for block in ready for i in block.masked]
        tokens = [token for block in ready for token in block.prediction.tokens]
        for k in chosen:
            self.canvas[positions[k]] = tokens[k]
            self.masked.remove(positions[k])
        chosen_logits = torch.cat([block.logits for block in ready])[chosen]
        self.steps += 1
        for number in range(self.finished()):
            self.done.setdefault(number, self.steps)
        return WindowStep(
            [positions[k] - self.P for k in chosen],
            margin,
            log_distribution(chosen_logits, self.model, self.settings),
            open=tuple(unfinished),
            active=tuple(number for number in unfinished if number in self.active),
            guaranteed=tuple(positions[k] - self.P for k in guaranteed),
            forced=tuple(positions[k] - self.P for k in forced),
        )

    def activate(self) -> None:
        for number in self.opened:
            if number == 0 or self.progress(number - 1) >= self.settings.decoded_token_threshold:
                self.active.setdefault(number, self.steps)

    def leave(self) -> None:
        """Finished blocks leave the window, in `block` commit_delay steps later."""
        while self.left in self.done and self.steps >= self.done[self.left] + self.settings.commit_delay:
            block = self.blocks[self.left]
            self.mode.finish(self.canvas, block[0], block[-1] + 1)
            self.left += 1

    def window_logits(self) -> dict[int, torch.Tensor]:
        """[columns] of each position of the window."""
        start, end = self.blocks[self.left][0], self.blocks[max(self.opened)][-1] + 1
        suffix_end = min(end + self.settings.suffix_window, len(self.canvas))
        logits = self.mode.logits(self.canvas, start, end, suffix_end)
        return dict(zip(range(start, end), logits, strict=True))

    def look(self, number: int, logits: dict[int, torch.Tensor]) -> OpenBlock:
        """A block's noise counts the steps since it was opened, its schedule and its limit those since it is active."""
        settings, n = self.settings, len(self.blocks[number])
        masked = [i for i in self.blocks[number] if i in self.masked]
        own = torch.stack([logits[i] for i in masked])
        output = [i - self.P for i in masked]
        prediction = predict(own, output, self.steps - self.opened[number], self.model.config, settings)
        limit, counted = step_limit(n, settings), settings.unmasking in COUNTED
        if number not in self.active or limit is None:
            return OpenBlock(masked, own, prediction, 0 if counted else None, False)
        active_step = self.steps - self.active[number]
        quota = quota_at(active_step, n, limit) if counted else None
        return OpenBlock(masked, own, prediction, quota, active_step == limit - 1)

    def open_one_more(self) -> None:
        """After a step, where the last open block has come far enough."""
        last = max(self.opened)
        if last + 1 < len(self.blocks) and self.progress(last) >= self.settings.block_add_threshold:
            self.opened[last + 1] = self.steps


def choose(ready: list[OpenBlock], settings: Settings) -> tuple[list[int], float, list[int], list[int]]:
    """Ascending indices into the masked positions of all open blocks; the step's margin; and of the indices what
    the guarantee, and what a step limit revealed."""
    numbers, count = [], 0
    for block in ready:
        numbers.append(list(range(count, count + len(block.masked))))
        count += len(block.masked)
    if settings.unmasking in COUNTED:
        return *scheduled(ready, numbers, settings), [], []
    together = Prediction(*(sum(parts, []) for parts in zip(*(parts_of(block) for block in ready), strict=True)))
    limited = [k for block, own in zip(ready, numbers, strict=True) if block.last for k in own]
    if len(limited) == count:
        return *reveal(together, None, True, settings), [], limited
    chosen, margin = reveal(together, None, False, settings)
    guaranteed = []
    if not set(chosen) & set(numbers[0]):
        guaranteed, gap = best(ready[0].prediction, settings)
        margin = min(margin, gap)
    margin = min([margin, *(together.token_margins[k] for k in guaranteed + limited)])
    return sorted({*chosen, *guaranteed, *limited}), margin, guaranteed, limited


def scheduled(ready: list[OpenBlock], numbers: list[list[int]], settings: Settings) -> tuple[list[int], float]:
    """Every block by itself, by its own schedule; where that reveals nothing, a threshold beside it still may."""
    chosen, margins = [], []
    for block, own in zip(ready, numbers, strict=True):
        if block.quota or settings.unmasking not in STATIC:
            indices, margin = reveal(block.prediction, block.quota, block.last, settings)
            chosen += [own[i] for i in indices]
            margins.append(margin)
    return chosen, min(margins)


def parts_of(block: OpenBlock) -> tuple[list, list, list, list]:
    prediction = block.prediction
    return prediction.tokens, prediction.token_margins, prediction.scores, prediction.entropy


def best(prediction: Prediction, settings: Settings) -> tuple[list[int], float]:
    """The best of one block by the rule's ranking, the first of equals, and how far the next one is."""
    by_entropy = settings.unmasking in ("entropy", "entropy_threshold")
    return by_rank([-value for value in prediction.entropy] if by_entropy else prediction.scores, 1)


def ended(result: Result, window: Window) -> bool:
    """Fills in the result's tokens, and how it ended where it did.

    With one block at a time a stop token counts once its block is finished, with several once all before it is
    revealed.
    """
    if result.settings.block_add_threshold < 1:
        end = min(window.masked, default=len(window.canvas))
    else:
        end = window.P + sum(len(block) for block in window.blocks[: window.finished()])
    result.tokens = window.canvas[window.P : end]
    stops = [i for i, token in enumerate(result.tokens) if token in result.settings.stop_ids]
    if stops:
        result.token_ids = result.tokens[: stops[0]]
        result.finish_reason, result.stop_reason = "stop", result.tokens[stops[0]]
        return True
    result.token_ids = list(result.tokens)
    return not window.masked
