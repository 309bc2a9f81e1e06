"""What can be seen of symmetric memory without GPUs: the group and the store through which the ranks meet."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from blockinfer.kernels import symmetric_memory
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
