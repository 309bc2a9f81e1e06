"""An engine on several ranks: each rank has a whole engine around its share of the model, and all make the same calls.

What an engine does depends only on these calls and on its device's results, which are the same on all ranks: for each
position's prediction the ranks combine the same numbers (kernels.sharded_confidence). So only calls are broadcast, and
nothing above the model knows of ranks.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager, suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from blockinfer.checks import reason
from blockinfer.config import EngineConfig
from blockinfer.decoding.likelihood import Mask
from blockinfer.engine.engine import Engine
from blockinfer.engine.prompts import Prompt, ReadPrompt
from blockinfer.loading import Loaded, Prepared, load
from blockinfer.memory import free_memory, num_pages, page_bytes
from blockinfer.models.transformer import Transformer
from blockinfer.outputs import RequestOutput, ScoringOutput
from blockinfer.parallel.group import Group
from blockinfer.parallel.interrupts import undivided
from blockinfer.sampling_params import SamplingParams
from blockinfer.scoring_params import ScoringParams

# What a call raises on all ranks alike; they continue after it.
AGREED = (ValueError, FloatingPointError)
# Steps per broadcast: a broadcast takes a tenth of a step, and if a rule has no
# schedule nothing overlaps it. Other calls wait for the last of these steps.
_STEPS = 4


class LeadingEngine(Engine):
    """The first rank's engine, which broadcasts every call that changes an engine, and steps several at a time. Besides
    what `Engine` raises, raises RuntimeError once another rank is gone."""

    _group: Group | None = None

    def __init__(
        self, model: Transformer, config: EngineConfig, tokenizer: PreTrainedTokenizerBase | None, group: Group
    ) -> None:
        # the other ranks' engines do the same by themselves
        super().__init__(model, config, tokenizer)
        self._group = group

    def add_request(
        self, prompt: Prompt | ReadPrompt, params: SamplingParams | None = None, *, stream: str | None = None
    ) -> int:
        if not isinstance(params, SamplingParams | None):
            return super().add_request(prompt, params, stream=stream)
        read = prompt if isinstance(prompt, ReadPrompt) else self.prompts.read(prompt)
        return self._everywhere("add_request", read, params, stream=stream)

    def add_scoring(
        self,
        token_ids: list[int],
        answer: range,
        masked: Items[Mask],
        reads: Items[list[tuple[int, int]]],
        params: ScoringParams,
    ) -> int:
        return self._everywhere("add_scoring", token_ids, answer, masked, reads, params)

    def draw_seed(self) -> int:
        return self._everywhere("draw_seed")

    def step(self) -> list[RequestOutput | ScoringOutput]:
        self._step_everywhere()
        # one statement, so Ctrl-C comes before or after it
        return (self._finished, vars(self).update(_finished=[]))[0]

    def abort(self, request_id: int) -> None:
        self._make_told_steps()
        kept = [output for output in self._finished if output.request_id != request_id]
        if any(output.finished for output in self._finished if output.request_id == request_id):
            # finished by one of these steps, and not yet returned
            self._finished = kept
            return
        self._everywhere("abort", request_id)
        self._finished = kept

    def abort_all(self) -> None:
        if self._group is None or self._group.failure:
            # also after an error that no rank recovers from
            super().abort_all()
        else:
            self._everywhere("abort_all")

    def restart(self, alone: bool = False) -> list[int]:
        return self._everywhere("restart", alone)

    def _make_told_steps(self) -> None:
        """Makes the steps already broadcast, before anything else is. The next step returns their outputs, or raises
        again what they raised."""
        while self._group.told_steps:
            with suppress(*AGREED):
                self._step_everywhere()

    def _step_everywhere(self) -> None:
        """Keeps its outputs."""
        group = self._group
        with self._made_by_all():
            if not group.told_steps:
                group.tell_steps(_STEPS)
            group.told_steps -= 1
            self._finished = super().step()
            if not self._sequences:
                # the other ranks' remaining steps do nothing
                group.told_steps = 0

    def _everywhere(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of this engine and of the other ranks' engines."""
        self._make_told_steps()
        with self._made_by_all():
            self._group.tell((name, args, kwargs))
            return getattr(super(), name)(*args, **kwargs)

    @contextmanager
    def _made_by_all(self) -> Iterator[None]:
        """Around a call that the other ranks make too."""
        group = self._group
        with undivided():
            group.begin_call()
            try:
                yield
            except AGREED:
                raise
            except BaseException as error:
                # if a rank is gone, torch first raises another error
                group.wait_for_failure(f"rank {group.rank} of {group.size} has failed: {reason(error)}")
                group.check()
            finally:
                group.end_call()


def load_share(
    group: Group, prepared: Callable[[], Prepared], seed: int, engine: type[Engine] = Engine
) -> tuple[Loaded, Engine]:
    """This rank's share of the model, and the engine around it; all ranks call it together. seed: the engine's, if its
    config names none. If one rank cannot load, raises ValueError on all of them, with its reason."""
    loaded = _together(group, lambda: load(prepared(), group.ranks))
    config, model = loaded.config, loaded.model_config
    group.ranks.reserve(model.d_model, config.dtype)
    pages = min(_together(group, lambda: num_pages(model, config, free_memory(config.device)), everyones=True))
    agreed = dataclasses.replace(
        config, kv_cache_memory=pages * page_bytes(model, config), seed=seed if config.seed is None else config.seed
    )
    extra = (group,) if engine is LeadingEngine else ()
    # a rank without memory for it would leave the others waiting in the first all-reduce
    made = _together(group, lambda: engine(loaded.network, agreed, loaded.tokenizer, *extra))
    made.runner.capture()
    return loaded, made


def _together(group: Group, function: Callable[[], Any], everyones: bool = False) -> Any:
    """The function's result on this rank, or with everyones a list of all ranks'. Raises ValueError if one failed."""
    result, failed = None, None
    try:
        result = function()
    except Exception as error:
        failed = error
    told = group.exchange((None if failed is None else reason(failed), result if everyones else None))
    for rank, (why, _) in enumerate(told):
        if why is not None:
            if rank == group.rank and isinstance(failed, ValueError):
                raise failed
            raise ValueError(f"rank {rank} of {group.size}: {why}") from failed
    return [value for _, value in told] if everyones else result


def draw_engine_seed() -> int:
    return random.getrandbits(64)
