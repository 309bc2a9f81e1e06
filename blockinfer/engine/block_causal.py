"""Requests to a block-causal network: positions see their own block and earlier ones, counted from position 0."""

from blockinfer.config import EngineConfig, ModelConfig
from blockinfer.decoding.modes import BlockState
from blockinfer.decoding.windows import OpenBlock
from blockinfer.engine.sequence import Saved, Sequence
from blockinfer.sampling_params import SamplingParams

# The mode that is exact here: each block sees itself and what was committed. The others let it see later positions.
EXACT_MODE = "block"


def check_block_causal(params: SamplingParams, has_spans: bool = False) -> None:
    """Raises ValueError for options that let a position see later blocks, which the network was not trained for, and
    for masked spans in the prompt."""
    if has_spans:
        raise ValueError(
            "masked spans must see what comes after them, and this model is block-causal: no mode fills them; leave "
            "them out of the prompt"
        )
    if params.mode != EXACT_MODE:
        raise ValueError(
            f"mode {params.mode!r} computes positions that see later blocks, and this model is block-causal: "
            f"use {EXACT_MODE!r}, which is exact there"
        )
    for name, alone in (("block_add_threshold", 1.0), ("suffix_window", 0), ("commit_delay", 0)):
        if getattr(params, name) != alone:
            raise ValueError(
                f"{name}={getattr(params, name)} has blocks see later ones, and this model is block-causal; "
                f"leave it {alone}"
            )


def most_tokens(config: EngineConfig, model: ModelConfig, block_length: int) -> int:
    """The limit on prompt plus answer; with a block-causal network both together fill whole blocks."""
    return config.max_model_len - (config.max_model_len % block_length if model.block_length is not None else 0)


class BlockCausalSequence(Sequence):
    """Blocks begin at multiples of block_length, so the first may contain the prompt's last tokens, which are given.
    The prompt before it is computed in blocks too. The last block is whole, even if only a part of it is output.
    """

    def _begin(self) -> None:
        length = self.params.block_length
        self.canvas_end = -(-self.canvas_end // length) * length
        start = self.prompt_len // length * length
        self._saved = Saved(start, (), (self._block_from(start),), 0, [], [])
        self._go_on()

    def _block_from(self, start: int) -> OpenBlock | None:
        """The schedule is that of a whole block even if a part is given, as in the published decoder."""
        length = self.params.block_length
        if start >= self.canvas_end:
            return None
        given = max(0, self.prompt_len - start)
        return self._open(start, start + length, length)._replace(left=length - given)

    def _state(self) -> BlockState:
        # no part of the prompt is computed as a whole
        return super()._state()._replace(prompt_len=0)

    def output_part(self, number: int) -> slice:
        first = max(0, self.prompt_len - self.block_start)
        return slice(first, min(number, self.prompt_len + self.params.max_tokens - self.block_start))

    def known_token_ids(self) -> list[int]:
        return super().known_token_ids()[: self.block_start]

    def given_after(self) -> list[int | None]:
        given = self.prompt_token_ids[self.block_start :]
        return given + [None] * (self.canvas_end - self.prompt_len) if given else []

    def shadow_token_ids(self) -> list[int | None]:
        return super().shadow_token_ids()[: self.block_start]

    def prompt_holder(self) -> None:
        """None: each answer has its own block with the prompt's last tokens."""
