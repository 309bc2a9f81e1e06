"""Checkpoints that two and three ranks can share."""

import pytest

from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.families.checkpoints import ILLADA, write_family

# columns past the vocabulary are among the last rank's
SIZES = dict(d_model=48, mlp_hidden_size=48, vocab_size=61, embedding_size=66)
SHAPES = {
    "dense": SIZES | dict(n_heads=6),
    "tied": SIZES | dict(n_heads=12, n_kv_heads=6, weight_tying=True, eos_token_id=[56, 3, 19], shards=2, seed=1),
}
GROUPED = dict(hidden_size=48, num_attention_heads=12, num_key_value_heads=6, intermediate_size=48, vocab_size=66)


@pytest.fixture(scope="session")
def shared_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    folders = {name: write_checkpoint(root / name, **shape) for name, shape in SHAPES.items()}
    for folder in folders.values():
        write_tokenizer(folder)
    return folders | {"illada": write_family(root / "illada", ILLADA, **GROUPED)}
