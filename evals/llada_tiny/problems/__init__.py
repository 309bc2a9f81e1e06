"""Seeded generators of the four kinds of problems, divided into train, validation and held-out by construction."""

import random

from evals.llada_tiny.problems.gsm8k import gsm8k
from evals.llada_tiny.problems.hotpotqa import hotpotqa, recital
from evals.llada_tiny.problems.math500 import math500
from evals.llada_tiny.problems.mmlu import lettering, mmlu

GENERATORS = {"gsm8k": gsm8k, "math500": math500, "mmlu": mmlu, "longbench_hotpotqa": hotpotqa}
SOURCES = tuple(GENERATORS)
DRILLS = {"mmlu": lettering, "longbench_hotpotqa": recital}


def problem(source: str, rng: random.Random, split: str, level: float = 1.0) -> dict:
    """A row of `source` with its `solution`; `level` in [0, 1] is the training's curriculum, 1 the real thing."""
    return {"source": source, **GENERATORS[source](rng, split, level)}


def drill(source: str, rng: random.Random, split: str, level: float = 1.0) -> dict:
    """Several questions of a source of DRILLS in one, for training: many places whose tokens have to be looked up."""
    return {"source": source, **DRILLS[source](rng, split, level)}
