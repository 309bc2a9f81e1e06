"""What can be seen of symmetric memory without GPUs: the group and the store through which the ranks meet."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from blockinfer.kernels import symmetric_memory
from blockinfer.kernels.linear import linear_parts
from blockinfer.kernels.parts import sum_parts
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
        return torch.empty_strided(size, stride, dtype=dtype)

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
        return SimpleNamespace(get_signal_pad=lambda rank: torch.zeros(8, dtype=torch.uint32))

    @staticmethod
    def memset32(tensor, offset, value, count):
        tensor[offset : offset + count] = value


@pytest.fixture
def alone(monkeypatch):
    """A group of this process, and torch's symmetric memory as far as a CPU has it."""
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", OnCPU)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(symmetric_memory, "TWO_SHOT_BYTES", 2**12)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


def test_torch_finds_the_group_by_its_name(alone):
    """Twice in a process, whose second buffer is not the first."""
    OnCPU.met.clear()
    made = [SymmetricBuffer.make(64, torch.bfloat16, torch.device("cpu"), alone) for _ in range(2)]
    assert [type(buffer) for buffer in made] == [SymmetricBuffer] * 2 and len(OnCPU.met) == 2
    one, other = (buffer._buffer for buffer in made)
    assert one.numel() == 2**11 and one.data_ptr() != other.data_ptr()
    # no more than torch can read, and of two kinds of numbers
    assert SymmetricBuffer.make(63, torch.bfloat16, torch.device("cpu"), alone) is None
    assert SymmetricBuffer.make(64, torch.float16, torch.device("cpu"), alone) is None


def test_what_is_written_there_is_not_copied(alone, monkeypatch):
    """A product's rows are in the buffer already; those of any other tensor, and the sum of parts, get there."""
    buffer = SymmetricBuffer.make(64, torch.bfloat16, torch.device("cpu"), alone)
    copied = []

    def copy(*rest):
        copied.append(rest)
        return sum_parts(*rest)

    monkeypatch.setattr(symmetric_memory, "sum_parts", copy)
    ops = SimpleNamespace(one_shot_all_reduce=lambda x, kind, group: x, two_shot_all_reduce_=None)
    monkeypatch.setattr(torch.ops, "symm_mem", ops)
    out = buffer.rows(3)
    weight, x = torch.randn(64, 8, dtype=torch.bfloat16), torch.randn(3, 8, dtype=torch.bfloat16)
    product = linear_parts(x, weight, out)
    assert product is out and torch.equal(buffer.all_reduce(product), x @ weight.T) and not copied
    parts = torch.ones(2, 3, 64)
    assert torch.equal(buffer.all_reduce(parts), torch.full((3, 64), 2.0, dtype=torch.bfloat16)) and len(copied) == 1
    assert buffer.rows(32).shape == (32, 64) and buffer.rows(33) is None and buffer.rows(0) is None


class WaitingGPU:
    """In as many sums with a rank that is gone: each waits for that one's signal to come and for its own to be taken,
    and sees the signals as they are now and then."""

    def __init__(self, sums, own, others):
        self.left, self.own, self.others = 2 * sums, own, others

    def look(self):
        if self.left % 2 == 0 and self.others[0] == 0:
            self.others[0], self.left = 1, self.left - 1
        elif self.left % 2 and self.own[0] == 1:
            self.own[0], self.left = 0, self.left - 1

    def is_done(self):
        return self.left <= 0


@pytest.mark.parametrize("sums", [0, 1, 65])
def test_a_gpu_that_waits_for_a_rank_that_is_gone_is_let_go(alone, monkeypatch, sums):
    buffer = SymmetricBuffer.make(64, torch.bfloat16, torch.device("cpu"), alone)
    own, others = buffer._pads[0], torch.ones(8, dtype=torch.uint32)
    buffer._pads.append(others)
    gpu = WaitingGPU(sums, own, others)
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
