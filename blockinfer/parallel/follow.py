"""What every rank but the first does: it makes the calls of the first rank, on its share of the model."""

import gc
from contextlib import suppress
from typing import Any

import torch

from blockinfer.config import EngineConfig
from blockinfer.engine.engine import Engine
from blockinfer.loading import prepare
from blockinfer.parallel.engine import AGREED, load_share
from blockinfer.parallel.group import Group


def follow(group: Group) -> None:
    """Runs until the first rank says that all is done. Raises FirstRankGone if that rank has ended without saying
    so."""
    engine: Engine | None = None
    while True:
        message = group.hear()
        if isinstance(message, int):
            for _ in range(message):
                _call(engine, "step")
            continue
        name, args, kwargs = message
        if name == "load":
            engine = _load(group, *args)
        elif name in ("close", "end"):
            if engine is not None:
                engine.runner.drop_graphs()
            engine = None
            gc.collect()
            if group.on_gpu:
                torch.cuda.empty_cache()
            if name == "end":
                return
        else:
            _call(engine, name, *args, **kwargs)


def _call(engine: Engine, name: str, *args: Any, **kwargs: Any) -> None:
    # the first rank raises it too, and says so
    with suppress(*AGREED):
        getattr(engine, name)(*args, **kwargs)


def _load(group: Group, config: EngineConfig, seed: int) -> Engine | None:
    """None if any rank failed to load: the first rank reports why, and closes."""
    try:
        _, engine = load_share(group, lambda: prepare(config), seed)
        return engine
    except ValueError:
        return None
