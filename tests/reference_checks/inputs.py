"""Shapes, special tokens and prompts for the checks of the reference."""

import numpy as np
from safetensors.torch import load_file

RULES = ["low_confidence", "random", "sequential", "threshold", "factor", "entropy", "entropy_threshold"]
MASK = 57
EOS, EOT = 56, 60
SHAPES = {
    "dense": dict(),
    "gqa": dict(n_kv_heads=2, seed=1),
    "tied": dict(weight_tying=True, n_kv_heads=1, seed=2),
    "wide": dict(embedding_size=64, d_model=48, seed=3),
}


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 55, draw.integers(1, longest + 1)).tolist() for _ in range(count)]


def load_all(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
