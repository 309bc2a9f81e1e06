"""Where the kernels' tests run, and a torch.empty that shows what a kernel writes and what it leaves."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

GUARD = 64  # elements on either side of a guarded allocation


@pytest.fixture(scope="session")
def device():
    """A GPU where there is one, and else the CPU, on which Triton's interpreter runs the kernels."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def bfloat16_products():
    """The interpreter multiplies the bit patterns of bfloat16 operands of a dot: they are widened before it does."""
    if torch.cuda.is_available():
        yield
        return
    right = interpreter.InterpreterBuilder.create_dot

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return right(self, wide(a), wide(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@contextmanager
def rounding_to_float8():
    """The interpreter cuts numbers off where it makes float8 of them: torch rounds instead, as GPUs do."""
    right = interpreter.InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self, handle, to, rounding):
        if to.scalar != tl.float8e4nv or handle.dtype.scalar != tl.float32:
            return right(self, handle, to, rounding)
        rounded = torch.from_numpy(handle.data.copy()).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), to.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)
        yield


@pytest.fixture(scope="session", autouse=True)
def float8_rounding():
    with nullcontext() if torch.cuda.is_available() else rounding_to_float8():
        yield


class GuardedEmpty:
    """torch.empty, poisoned: NaN (or the lowest integer) inside and around; `check` sees whether the border was hit."""

    def __init__(self, empty):
        self.empty = empty
        self.allocated = []

    def __call__(self, *shape, dtype=torch.float32, device=None):
        shape = torch.Size(shape[0] if isinstance(shape[0], tuple | torch.Size) else shape)
        buffer = self.empty(shape.numel() + 2 * GUARD, dtype=dtype, device=device)
        buffer.fill_(self.poison(dtype))
        self.allocated.append(buffer)
        return buffer[GUARD : GUARD + shape.numel()].view(shape)

    @staticmethod
    def poison(dtype):
        return torch.nan if dtype.is_floating_point else 0 if dtype == torch.bool else torch.iinfo(dtype).min

    def check(self):
        assert self.allocated
        for buffer in self.allocated:
            border = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
            border = border.float() if buffer.dtype == torch.float8_e4m3fn else border
            untouched = border.isnan() if buffer.dtype.is_floating_point else border == self.poison(buffer.dtype)
            assert untouched.all(), "a kernel wrote outside its output"
        self.allocated.clear()


@pytest.fixture(scope="module")
def guarded_empty():
    """Every torch.empty of the module's tests is a GuardedEmpty's."""
    with pytest.MonkeyPatch.context() as patch:
        guarded = GuardedEmpty(torch.empty)
        patch.setattr(torch, "empty", guarded)
        yield guarded
