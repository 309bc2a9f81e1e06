"""What an engine counts."""

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Counts since the engine was made, without padding. forwards: model launches. rows: rows in them. lm_head_rows:
    rows through the LM head. keys: cached positions that a launch attends to, once per sequence and once per shadow.

    graphs: CUDA graphs captured, where those that a forward is cut into count as one; capture_seconds and graph_bytes:
    their cost, compilation included. compiled: variants of Triton kernels that this process has loaded.
    """

    forwards: int = 0
    rows: int = 0
    lm_head_rows: int = 0
    keys: int = 0
    graphs: int = 0
    capture_seconds: float = 0.0
    graph_bytes: int = 0
    compiled: int = 0
