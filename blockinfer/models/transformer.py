"""What all networks have in common: embeddings, layers over a paged KV cache, a final norm and a head."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from blockinfer.kernels.linear import linear
from blockinfer.kernels.quantize import QuantizedWeight
from blockinfer.kernels.ranks import ALONE, Ranks
from blockinfer.kernels.segments import SegmentTable
from blockinfer.model_config import ModelConfig
from blockinfer.models.published import TensorGroup

# Indices of layers after which the graph of a step is cut: the parts before run for longer than the next takes to
# launch, on a slow host too (measured on an H200: LLaDA-8B's first layer runs for 130 us).
_CUTS = 0, 3


class Transformer(nn.Module):
    """A network whose logits at a position predict the token at that position, without a shift.

    layers: each with `attend` and `finish`, as in `models.llada.LLaDALayer`. cos_sin: `rope_tables` of all positions.
    config is of the whole network. n_heads, n_kv_heads: this rank's; each rank has all embeddings, and a share of the
    head's vocabulary.
    QUANTIZES: whether the class supports quantization="fp8", which makes the layers' matrices QuantizedWeights.
    EMBEDDINGS, HEAD: the published names of these two tensors. TIED_BY: the config's field that ties them.
    IS_SHARED: whether ranks can split the network. Then it takes `ranks`, and all matrices but the embeddings are
    split: by columns those of a layer named in BY_COLUMNS, by rows the others.
    """

    QUANTIZES: ClassVar[bool] = False
    EMBEDDINGS: ClassVar[str]
    HEAD: ClassVar[str]
    TIED_BY: ClassVar[str]
    IS_SHARED: ClassVar[bool] = False
    BY_COLUMNS: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: ModelConfig,
        layers: Iterable[nn.Module],
        cos_sin: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks
        self.n_heads, self.n_kv_heads = config.n_heads // ranks.size, config.n_kv_heads // ranks.size
        columns = config.embedding_size // ranks.size
        self.wte = unfilled(config.embedding_size, config.d_model, dtype=dtype, device=device)
        self.layers = nn.ModuleList(layers)
        self.ln_f = unfilled(config.d_model, dtype=dtype, device=device)
        if config.weight_tying:
            self.lm_head = self.wte if ranks.size == 1 else self.wte.data[ranks.rank * columns :][:columns]
        else:
            self.lm_head = unfilled(columns, config.d_model, dtype=dtype, device=device)
        self.cos_sin = cos_sin

    @staticmethod
    @abstractmethod
    def read_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
        """Reads a config.json's content; `source` names it in errors.

        Raises ValueError for a missing or impossible size and for a value that the network does not implement.
        """

    @staticmethod
    @abstractmethod
    def published(config: ModelConfig) -> list[TensorGroup]:
        """The tensors of a checkpoint, those of `checkpoint_tensors`."""

    @abstractmethod
    def checkpoint_tensors(self) -> dict[str, torch.Tensor | QuantizedWeight]:
        """The published tensor names, each with the part of a parameter that it fills, in the published shape or, with
        several ranks, this rank's share of its rows or columns."""

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_pages: torch.Tensor,
        table: SegmentTable,
        attended: torch.Tensor,
        residual: torch.Tensor,
        cut: Callable[[], None] | None = None,
    ) -> None:
        """token_ids, positions [T] int64; kv_pages [layers, 2, pages, P, HK, D], written. Runs everything up to the
        last layer's attention, which every row needs, and writes the inputs of `logits`: attended [T, heads * D] and
        residual [T, d]. cut: called after the layers of _CUTS (`engine.graphs`)."""
        torch.index_select(self.wte, 0, token_ids, out=residual)
        x = None
        cos_sin = self.cos_sin[positions]
        *others, last = zip(self.layers, kv_pages, strict=True)
        for index, (layer, layer_pages) in enumerate(others):
            x = layer.finish(layer.attend(x, residual, cos_sin, layer_pages, table), residual)
            if index in _CUTS and cut is not None:
                cut()
        last[0].attend(x, residual, cos_sin, last[1], table, attended)

    def logits(self, attended: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """attended, residual: as `forward` wrote them; rows [N] int64 -> logits of these rows for this rank's share of
        the vocabulary, [N, embedding_size / ranks]."""
        attended, residual = attended[rows], residual[rows]
        x = self.layers[-1].finish(attended, residual)
        return linear(self.ranks.add_rms_norm(x, residual, self.ln_f, self.config.rms_norm_eps), self.lm_head)


def unfilled(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter that `weights.py` fills."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
