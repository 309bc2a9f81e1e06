"""What every rank but the first does: it makes the calls that the first one makes, on its share of the model."""

import gc

import torch

from blockinfer.config import EngineConfig
from blockinfer.engine.engine import Engine
from blockinfer.loading import prepare
from blockinfer.parallel.engine import AGREED, load_share
from blockinfer.parallel.group import Group


def follow(group: Group) -> None:
    """Until the first rank says that all is over. Raises FirstRankGone where it has ended before."""
    engine: Engine | None = None
    while True:
        message = group.hear()
        name, args, kwargs = message or ("step", (), {})
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
            try:
                getattr(engine, name)(*args, **kwargs)
            except AGREED:
                # the first rank has raised it too, and says so
                pass


def _load(group: Group, config: EngineConfig, seed: int) -> Engine | None:
    """None where a rank could not: the first one says why, and closes."""
    try:
        _, engine = load_share(group, lambda: prepare(config), seed)
        return engine
    except ValueError:
        return None
