"""What can be seen of symmetric memory without GPUs: the store through which the ranks meet."""

import pytest
import torch.distributed as dist

from blockinfer.kernels.symmetric_memory import FromNowOn


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
