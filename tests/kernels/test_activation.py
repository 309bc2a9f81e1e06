"""silu(gate) * up, kernel and twin, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockinfer.kernels.activation import silu_mul_torch, silu_mul_triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 5),
    columns=st.integers(1, 200),
    scale=st.sampled_from([0.0, 1.0, 60.0]),
    dtype=st.sampled_from([*TOLERANCE]),
)
def test_equals_its_definition(device, guarded_empty, seed, rows, columns, scale, dtype):
    g = torch.Generator().manual_seed(seed)
    gate_up = (torch.randn(rows, 2 * columns, generator=g) * scale).to(dtype).to(device)
    before = gate_up.clone()
    gate, up = gate_up.double().cpu().split(columns, dim=1)
    for out in (silu_mul_triton(gate_up, block=64), silu_mul_torch(gate_up)):
        assert out.dtype == dtype
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out.double().cpu(), gate / (1 + (-gate).exp()) * up, rtol=tolerance, atol=tolerance)
    assert torch.equal(gate_up, before)
    guarded_empty.check()


@pytest.mark.parametrize("gate_up", [torch.zeros(2, 3), torch.zeros(4, 2).mT, torch.zeros(4)])
def test_misfits_are_named(gate_up):
    with pytest.raises(ValueError, match=r"contiguous \[T, 2 \* m\], got"):
        silu_mul_triton(gate_up)
