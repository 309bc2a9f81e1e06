"""First weights that can already look things up: local heads record neighbours, matching heads find equal ones.

From small random weights, a look-up in the prompt needs several things at once (a token knows its neighbours, a masked
place finds the same neighbours elsewhere, the token there is copied), none of which lowers the loss alone. Here heads
begin as parts of induction heads (C. Olsson et al., arXiv:2209.11895), in the manner of "mimetic initialization" (A.
Trockman and J. Z. Kolter, arXiv:2305.09828): products of query and key, and of value and output, are close to the
identity.
"""

import torch
from torch import Tensor

from evals.llada_tiny.model import Block, TinyLLaDA

# Offsets of the local heads' favourite keys. In every other pair of layers the last one is a place farther, since a
# number is identified by what follows its space.
OFFSETS = ((-1, -4, 2), (-1, -4, 3))
LOCAL_SCORE = 24.0  # attention score of a local head at its favourite key
MATCH_SCORE = 24.0  # of a matching head between equal contents
REPEL_SCORE = -12.0  # of a matching head to its own place, beside that, so that it looks elsewhere
FREE = 3  # of four heads, the one that keeps small random weights


@torch.no_grad()
def initialise(model: TinyLLaDA, generator: torch.Generator) -> None:
    """The residual stream gets three parts besides a direction common to all tokens: content, previous, earlier.

    Embeddings have content only. In even layers head 0 records the previous token's content, head 1 that of the token
    four places back, head 2 puts that of the token two or three places on into the content; in odd layers heads 0, 1
    and 2 attend to tokens equal in content, in the previous one and in the earlier one, and copy their content. MLPs
    stay as they are.
    """
    d = model.shape.d_model
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator))[0].T
    common, blank = basis[:2]  # the mask token's content is blank, so that it matches nothing
    content, previous, earlier = basis[2 : d // 2], basis[d // 2 : 3 * d // 4], basis[3 * d // 4 :]
    wte = model.transformer["wte"].weight
    codes = torch.randn(len(wte), len(content), generator=generator) / len(content) ** 0.5
    wte.copy_(codes @ content + common)
    wte[model.shape.mask_token_id] = common + blank
    parts = (content, previous, earlier)
    for layer, block in enumerate(model.transformer["blocks"]):
        for head in range(block.n_heads):
            role = head % 4
            if role == FREE:
                continue
            rows = slice(head * d // block.n_heads, (head + 1) * d // block.n_heads)
            if layer % 2 == 0:
                _attend_at(block, rows, OFFSETS[layer // 2 % 2][role], LOCAL_SCORE, common, model.frequencies)
                _copy(block, rows, content, (previous, earlier, content)[role], generator)
            else:
                _attend_at(block, rows, 0, REPEL_SCORE, common, model.frequencies)
                _match(block, rows, parts[role], generator)
                _copy(block, rows, content, content, generator)


def _fast(frequencies: Tensor) -> Tensor:
    """[D]: 1 for the quarter of RoPE's dimensions that turn most from place to place."""
    return (torch.arange(len(frequencies)) < len(frequencies) // 4).float().repeat(2)


def _attend_at(block: Block, rows: slice, offset: int, score: float, common: Tensor, frequencies: Tensor) -> None:
    """Attention score `score` to the key `offset` places on, falling off around it, by the common direction."""
    d, fast = len(common), _fast(frequencies)
    # the product of the common parts of two normed tokens is about d / 3; a score is divided by sqrt(D)
    size = (abs(score) * len(fast) ** 0.5 / (d / 3) / (fast.sum() / 2)) ** 0.5
    angle = frequencies * offset
    query = torch.cat([angle.cos(), angle.sin()]) * fast * size
    key = torch.cat([torch.ones_like(angle), torch.zeros_like(angle)]) * fast * size
    block.q_proj.weight[rows] += query[:, None] * common * (1 if score > 0 else -1)
    block.k_proj.weight[rows] += key[:, None] * common


def _match(block: Block, rows: slice, part: Tensor, generator: torch.Generator) -> None:
    """Attention score MATCH_SCORE between tokens equal in this part of the residual stream."""
    D, d = rows.stop - rows.start, part.shape[1]
    projection = _projection(D, len(part), generator) @ part
    slow = 1 - _fast(torch.arange(D // 2))
    # about d / 3 of a normed token's squared norm d is in this part, of which the projection keeps its dimensions'
    # share
    size = (MATCH_SCORE * D**0.5 / (d / 3 * min(1.0, slow.sum() / len(part)))) ** 0.5
    block.q_proj.weight[rows] += size * slow[:, None] * projection
    block.k_proj.weight[rows] += size * slow[:, None] * projection


def _copy(block: Block, rows: slice, source: Tensor, target: Tensor, generator: torch.Generator) -> None:
    """Write what the attended tokens have in `source` to `target`, at about its size in the residual stream."""
    D, d = rows.stop - rows.start, source.shape[1]
    block.v_proj.weight[rows] += _projection(D, len(source), generator) @ source
    into = source if target is source else _projection(D, len(target), generator) @ target
    back = block.v_proj.weight[rows].T if target is source else into.T
    block.attn_out.weight[:, rows] += (3 / d) ** 0.5 * back


def _projection(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] with orthonormal rows, or orthonormal columns where there are fewer of these."""
    q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))[0]
    return q if rows >= columns else q.T
