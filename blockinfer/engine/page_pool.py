"""The pages of the KV cache: who may use which. Numbers only, no tensors."""


class PagePool:
    """num_pages pages of page_size tokens; each is free or owned by one holder of its number."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages))[::-1]
        self._is_free = [True] * num_pages

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
            self._is_free[page] = False
        return pages

    def free(self, pages: list[int]) -> None:
        """Gives pages back; each must be in use."""
        for page in pages:
            assert not self._is_free[page], f"page {page} freed twice"
            self._is_free[page] = True
        self._free.extend(reversed(pages))
