"""Prompts with masked spans: a sequence that fills the spans and keeps the text between them."""

from itertools import takewhile

from blockinfer.decoding.modes import SEE_SUFFIX
from blockinfer.decoding.windows import OpenBlock
from blockinfer.engine.sequence import Sequence
from blockinfer.sampling_params import SamplingParams


def check_infilling(tokens: list[int | None], params: SamplingParams) -> None:
    """Raises ValueError if the params do not allow filling these spans."""
    if params.mode not in SEE_SUFFIX:
        raise ValueError(
            f"mode {params.mode!r} drops what is after a block, which infilling must see; use {', '.join(SEE_SUFFIX)}"
        )
    if params.block_add_threshold < 1:
        raise ValueError(
            f"masked spans are filled a block at a time, got block_add_threshold={params.block_add_threshold}; "
            "leave it 1.0"
        )
    if params.editing_threshold is not None:
        raise ValueError(
            f"what fills masked spans is not edited, got editing_threshold={params.editing_threshold}; leave it None"
        )
    if tokens.count(None) > params.max_tokens:
        raise ValueError(
            f"the masked spans have {tokens.count(None)} positions, more than max_tokens={params.max_tokens}; raise it"
        )


class InfillSequence(Sequence):
    """Blocks start at masked positions and have block_length positions, or fewer up to the last masked one. Given text
    inside a block stays. The prompt ends at the first masked position; everything from there on is output."""

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        tokens: list[int | None],
        params: SamplingParams,
        seed: int,
        stop_token_ids: frozenset[int],
        siblings: list[Sequence],
        prompt_token_ids: list[int],
    ) -> None:
        """tokens: the whole canvas, None where masked."""
        first = tokens.index(None)
        self.tail = tokens[first:]
        self._masked_end = len(tokens) - tokens[::-1].index(None)
        super().__init__(request_id, prompt, tokens[:first], params, seed, stop_token_ids, siblings)
        self.asked_token_ids = prompt_token_ids
        self.canvas_end = len(tokens)

    def _block_from(self, start: int) -> OpenBlock | None:
        """The block that begins at the next masked position."""
        while start < self._masked_end and self.tail[start - self.prompt_len] is not None:
            start += 1
        stop = min(start + self.params.block_length, self._masked_end)
        masked = self.tail[start - self.prompt_len : stop - self.prompt_len].count(None)
        return self._open(start, stop, masked) if masked else None

    def given_after(self) -> list[int | None]:
        return self.tail[len(self.output_token_ids) :]

    def shadow_token_ids(self) -> list[int | None]:
        output = [t if fixed is None else None for t, fixed in zip(self.output_token_ids, self.tail, strict=False)]
        return [None] * self.prompt_len + output

    def finish(
        self,
        token_ids: list[int | None],
        number: int,
        logprobs: list[dict[int, tuple[float, int]]] | None = None,
    ) -> None:
        """Also finishes the given text up to the next masked position."""
        given = list(takewhile(lambda token: token is not None, self.given_after()[number:]))
        super().finish(token_ids + given, number + len(given), logprobs and logprobs + [{}] * len(given))

    def stop_position(self) -> int | None:
        """None: a stop token ends only its own span."""
        return None

    def is_finished(self) -> bool:
        return self.has_all_blocks()

    def spans(self) -> list[slice]:
        """The masked spans, as slices of the output."""
        edges = [
            i
            for i, (a, b) in enumerate(zip([0, *self.tail], [*self.tail, 0], strict=True))
            if (a is None) != (b is None)
        ]
        return [slice(*pair) for pair in zip(edges[::2], edges[1::2], strict=True)]
