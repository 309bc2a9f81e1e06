"""The pages of the KV cache: who may use which. Numbers only, no tensors."""


class PagePool:
    """num_pages pages of page_size tokens; each is free or held, by one sequence or by several that share it."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages))[::-1]
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages; the caller has made sure that there are as many."""
        assert count <= len(self._free), f"{count} pages asked for, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more holder for each of the pages, all of which are in use."""
        for page in pages:
            assert self._holders[page], f"page {page} is free"
            self._holders[page] += 1

    def free(self, pages: list[int]) -> None:
        """Gives a holder's pages back; each must be in use, and is free once its last holder gives it back."""
        for page in reversed(pages):
            assert self._holders[page], f"page {page} freed twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
