"""Allocation of KV cache pages. Numbers only, no tensors."""


class PagePool:
    """num_pages pages of page_size tokens; each is free, or held by one or several sequences."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages))[::-1]
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """The number of pages for `tokens` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages; the caller must check that as many are free."""
        assert count <= len(self._free), f"{count} pages asked for, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """Adds a holder to each of the pages, all of which must be in use."""
        for page in pages:
            assert self._holders[page], f"page {page} is free"
            self._holders[page] += 1

    def free(self, pages: list[int]) -> None:
        """Releases a holder's pages. Each must be in use, and is free once its last holder releases it."""
        for page in reversed(pages):
            assert self._holders[page], f"page {page} freed twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
