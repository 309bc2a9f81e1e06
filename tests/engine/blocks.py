"""Blocks that are through without an engine."""

from blockinfer.engine.sequence import Sequence


def finish_block(sequence: Sequence, token: int = 2) -> None:
    """The one open block's last step, which left it full of one token."""
    token_ids = [token] * (sequence.block_end - sequence.block_start)
    sequence.finish(token_ids, sequence.advance([0], token_ids))
