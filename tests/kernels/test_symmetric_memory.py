"""What can be seen of symmetric memory without GPUs: the group and the store through which the ranks meet."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from blockinfer.kernels import norm, ranks, symmetric_memory
from blockinfer.kernels.linear import linear_parts
from blockinfer.kernels.norm import add_rms_norm
from blockinfer.kernels.ranks import RankGroup
from blockinfer.kernels.symmetric_memory import FromNowOn, SymmetricBuffer


def test_exchanges_are_numbered_from_now_on():
    """One process has met others before: torch's number of an exchange is 3 there, and 0 here."""
    shared = dist.HashStore()
    stores = [FromNowOn(shared, name) for name in ("name", "name", "another name")]
    # as torch's own code calls them, from C++
    one, other, stranger = (dist.PrefixStore("CUDASymmetricMemory", store) for store in stores)
    for number in range(2):
        one.set(f"{3 + number}/0", b"a\0b")
        other.set(f"{number}/1", b"c")
        assert one.multi_get([f"{3 + number}/0", f"{3 + number}/1"]) == [b"a\0b", b"c"]
        assert other.multi_get([f"{number}/0", f"{number}/1"]) == [b"a\0b", b"c"]
    assert one.add("5", 1) == 1 and other.add("2", 1) == 2
    assert one.check(["5"]) and not one.check(["6/0"])
    assert not stranger.check(["0/0"])


def test_a_rank_that_does_not_answer():
    python = FromNowOn(dist.HashStore(), "name", seconds=0.05)
    store = dist.PrefixStore("CUDASymmetricMemory", python)
    for call in (store.get, lambda key: store.wait([key])):
        with pytest.raises(RuntimeError, match="no other rank has answered"):
            call("0/1")


class OnCPU:
    """Of torch's class what is used here, on a CPU: two exchanges of a rendezvous, by the store of the group that has
    the name, as torch 2.11 makes them and later ones do."""

    number = 7
    met = {}

    @staticmethod
    def empty_strided_p2p(size, stride, dtype, device):
        return torch.empty_strided(size, stride, dtype=dtype).fill_(7)

    @classmethod
    def rendezvous(cls, tensor, name):
        group = _resolve_process_group(name)
        # torch's operations ask for it
        assert group.group_name
        for _ in range(2):
            key = f"CUDASymmetricMemory/{cls.number}/"
            store = dist.PrefixStore(key.removesuffix("/"), group.get_group_store())
            store.set(str(group.rank()), b"here")
            assert [store.get(str(rank)) for rank in range(group.size())] == [b"here"] * group.size()
            cls.number += 1
        cls.met[name] = tensor
        # by now no other rank's signal can be lost
        assert not tensor[-8:].any()
        return SimpleNamespace(buffer_ptrs=[tensor.data_ptr()])

    @staticmethod
    def memset32(tensor, offset, value, count):
        tensor[offset : offset + count] = value


@pytest.fixture
def alone(monkeypatch):
    """A group of this process, and torch's symmetric memory as far as a CPU has it."""
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", OnCPU)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(symmetric_memory, "SUM_BYTES", 2**12)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


def test_torch_finds_the_group_by_its_name(alone):
    """Twice in a process, whose second buffer is not the first."""
    OnCPU.met.clear()
    made = [SymmetricBuffer.make(64, torch.bfloat16, torch.device("cpu"), alone) for _ in range(2)]
    assert [type(buffer) for buffer in made] == [SymmetricBuffer] * 2 and len(OnCPU.met) == 2
    one, other = (buffer.rows(2) for buffer in made)
    assert one.shape == (2, 64) and one.dtype == torch.bfloat16 and one.data_ptr() != other.data_ptr()


def test_what_is_written_there_is_not_copied(alone, monkeypatch):
    """A product's rows are in the buffer already; those of any other tensor, and parts, get there."""
    group = RankGroup(torch.device("cpu"), alone, lambda event: None)
    group._buffer = SymmetricBuffer.make(64, torch.float32, torch.device("cpu"), alone)
    others = []
    monkeypatch.setattr(ranks, "add_rms_norm", lambda x, *rest: others.append(x) or add_rms_norm(x, *rest))
    out = group.sum_out(3)
    matrix, x = torch.randn(64, 8), torch.randn(3, 8)
    product = linear_parts(x, matrix, out)
    assert product is out
    weight = torch.randn(64)
    parts = torch.stack([product * 0.25, product * 0.75])
    for share in (product, product.clone(), parts):
        residual = torch.ones(3, 64)
        normed = group.add_rms_norm(share, residual, weight, 1e-5)
        expected, total = add_rms_norm(x @ matrix.T, torch.ones(3, 64), weight, 1e-5)
        torch.testing.assert_close(normed, expected)
        torch.testing.assert_close(residual, total)
    assert not others
    # nothing to sum, and more rows than there is room for
    few, many = torch.ones(3, 64), torch.ones(17, 64)
    assert torch.equal(group.add_rms_norm(None, few, weight, 1e-5), norm.add_rms_norm_torch(None, few, weight, 1e-5))
    assert group.sum_out(16).shape == (16, 64) and group.sum_out(17) is None and group.sum_out(0) is None
    assert group.add_rms_norm(torch.ones(17, 64), many, weight, 1e-5).shape == (17, 64) and (many == 2).all()
    assert len(others) == 2


@pytest.mark.parametrize(
    "device, dtype, expected",
    [("cuda", torch.bfloat16, "made"), ("cuda", torch.float64, None), ("cpu", torch.float32, None)],
)
def test_memory_is_shared_where_the_kernel_runs(alone, monkeypatch, device, dtype, expected):
    monkeypatch.setattr(SymmetricBuffer, "make", lambda *rest: "made")
    group = RankGroup(torch.device(device), alone, lambda event: None)
    group.reserve(64, dtype)
    assert group._buffer == expected


class WaitingGPU:
    """In as many sums with a rank that is gone. Each waits twice until every signal is as high as it asks for; a rank
    that is still there sends a lower one after the first is seen."""

    def __init__(self, sums, signals):
        self.left, self.call, self.signals, self.sent = 2 * sums, 10**6, signals, False

    def look(self):
        while self.left and (self.signals > self.call).all():
            self.left, self.call = self.left - 1, self.call + 1
            if not self.sent:
                self.signals[0], self.sent = 1, True

    def is_done(self):
        return self.left == 0


@pytest.mark.parametrize("sums", [0, 1, 65])
def test_a_gpu_that_waits_for_a_rank_that_is_gone_is_let_go(alone, monkeypatch, sums):
    buffer = SymmetricBuffer.make(64, torch.bfloat16, torch.device("cpu"), alone)
    gpu = WaitingGPU(sums, buffer.memory.signals)
    written = symmetric_memory.set_signals
    monkeypatch.setattr(symmetric_memory, "set_signals", lambda *rest: (written(*rest), gpu.look()))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    assert buffer.let_go(gpu.is_done, 5.0)


def test_a_gpu_that_waits_for_something_else_is_not_waited_for(alone, monkeypatch):
    buffer = SymmetricBuffer.make(64, torch.bfloat16, torch.device("cpu"), alone)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    begin = time.monotonic()
    assert not buffer.let_go(lambda: False, 0.05)
    assert time.monotonic() - begin < 3
