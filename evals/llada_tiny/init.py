"""First weights that already look things up a little: local heads, matching heads and copying outputs.

From small random weights, a look-up in the prompt needs several things at once (a token knows its neighbours, a masked
place finds the same neighbours elsewhere, what stands there is copied), none of which lowers the loss alone. Starting
from products of query and key, and of value and output, that are close to the identity is "mimetic initialization"
(A. Trockman and J. Z. Kolter, arXiv:2305.09828); heads at a fixed distance are added here, by a phase of RoPE.
"""

import torch
from torch import Tensor

from evals.llada_tiny.model import Block, TinyLLaDA

# (favourite key relative to the query, how sharp: attention score there) of the local heads, in turn
LOCAL = ((-1, 16.0), (1, 16.0), (-4, 5.0), (4, 5.0))
# attention score of a matching head between equal tokens far apart; tokens nearby repel each other as much
MATCH = 16.0
COPY = 0.5  # what a head adds of a wholly attended token, relative to a token's own embedding


@torch.no_grad()
def initialise(model: TinyLLaDA, generator: torch.Generator) -> None:
    """Embeddings of norm 1 beside a common part, heads by their place; the MLPs keep the weights they have."""
    d = model.shape.d_model
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator))[0].T
    common, blank = basis[:2]  # in every token; in place of the mask token's content, so that it matches nothing
    content = torch.eye(d) - basis[:2].T @ basis[:2]
    wte = model.transformer["wte"].weight
    wte.copy_(torch.randn(wte.shape, generator=generator) / d**0.5 @ content + common)
    wte[model.shape.mask_token_id] = common + blank
    for layer, block in enumerate(model.transformer["blocks"]):
        for head in range(block.n_heads):
            _head(block, layer, head, common, content, model.frequencies, generator)


def _head(
    block: Block,
    layer: int,
    head: int,
    common: Tensor,
    content: Tensor,
    frequencies: Tensor,
    generator: torch.Generator,
) -> None:
    d, pairs = len(common), len(frequencies)
    rows = slice(head * 2 * pairs, (head + 1) * 2 * pairs)
    fast = torch.arange(pairs) < pairs // 4
    unit = (d * (2 * pairs) ** -0.5 / 2) ** -0.5  # makes the product of two common parts, d / 2, a score of 1
    offset, score = LOCAL[(layer + head) % len(LOCAL)]
    if layer > 0 and head % 4 == 3:  # free: nothing but small random weights
        return
    if layer > 0 and head % 4 > 0:
        offset, score = 0, -MATCH
        same = torch.linalg.qr(torch.randn(d, 2 * pairs, generator=generator))[0].T @ content
        same *= ~fast.repeat(2)[:, None]
        # the product of two equal tokens' projections to 3/2 pairs of d dimensions, whose squared norm is d / 2
        size = (MATCH * (2 * pairs) ** 0.5 / (0.75 * pairs)) ** 0.5
        block.q_proj.weight[rows] += size * same
        block.k_proj.weight[rows] += size * same
    size = unit * (abs(score) / fast.sum()) ** 0.5
    angle = frequencies * offset
    query, key = torch.cat([angle.cos(), angle.sin()]), torch.cat([torch.ones(pairs), torch.zeros(pairs)])
    block.q_proj.weight[rows] += size * (query * fast.repeat(2))[:, None] * common * (1 if score > 0 else -1)
    block.k_proj.weight[rows] += size * (key * fast.repeat(2))[:, None] * common
    copied = torch.linalg.qr(torch.randn(d, 2 * pairs, generator=generator))[0].T @ content
    block.v_proj.weight[rows] += copied
    block.attn_out.weight[:, rows] += COPY * (2 / d) ** 0.5 * copied.T * d / (2 * pairs) / block.n_heads
