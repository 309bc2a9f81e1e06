"""How far fp8 moves a shape's logits: the command."""

import gc
import weakref

import pytest
import torch

from blockinfer import LLM
from evals.timing import rounding

SMALL = dict(d_model=128, n_heads=4, mlp_hidden_size=256, vocab_size=500, embedding_size=512, max_sequence_length=256)


@pytest.fixture
def small(monkeypatch):
    shape = rounding.SHAPES["llada-8b"] | SMALL | dict(mask_token_id=499, eos_token_id=498, n_kv_heads=4)
    monkeypatch.setitem(rounding.SHAPES, "llada-8b", shape)


def test_the_error_is_fp8_s_and_grows_with_the_layers(small, capsys):
    rounding.main(["--layers", "1,16"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    layers, errors = zip(*(map(float, row.strip("| ").split(" | ")) for row in rows), strict=True)
    assert layers == (1, 16) and 2 < errors[0] < errors[1] < 100


def test_the_weights_are_the_same_with_and_without(small):
    """So that nothing but rounding differs: of fp8 with 3 bits of a fraction, by far less than of other weights."""
    config = rounding.SHAPES["llada-8b"] | {"n_layers": 1}
    plain, quantized = (rounding.masked_logits(config, "float32", name) for name in (None, "fp8"))
    assert plain.shape == (32, 500) and plain.dtype == torch.float32
    assert 1e-3 < (quantized - plain).norm() / plain.norm() < 0.2


def test_the_first_model_s_memory_is_there_for_the_second(small, monkeypatch):
    models = []

    class Watched(LLM):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            models.append(weakref.ref(self.engine.model))

    monkeypatch.setattr(rounding, "LLM", Watched)
    gc.disable()
    try:
        rounding.masked_logits(rounding.SHAPES["llada-8b"] | {"n_layers": 1}, "float32", None)
        assert len(models) == 1 and models[0]() is None
    finally:
        gc.enable()


def test_shapes_that_are_not_quantised_are_no_choice(capsys):
    with pytest.raises(SystemExit):
        rounding.main(["--model", "llada2-mini"])
    assert "invalid choice: 'llada2-mini' (choose from" in capsys.readouterr().err
