"""The device's side of a step: forward, confidence, unmasking, and the tokens and KV pages they act on."""

from dataclasses import dataclass

import torch

from blockinfer.config import EngineConfig
from blockinfer.decoding.unmasking import RULES
from blockinfer.engine.batch import build_batch
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence
from blockinfer.kernels.confidence import RowNoise, token_confidence
from blockinfer.models.llada import LLaDA

# Rows that go through the LM head at once: bounds the logits' memory (at 126,464 columns, 130 MB in float32).
_LM_HEAD_ROWS = 256


@dataclass
class EngineStats:
    """Counts since the engine was made: model launches, rows in them, rows through the LM head."""

    forwards: int = 0
    rows: int = 0
    lm_head_rows: int = 0


class ModelRunner:
    """Owns the token state and the KV pages.

    tokens [slots, max_model_len] int64: prompt, revealed tokens, and the mask token where nothing is revealed yet.
    masked, of that shape, bool: what is still to be revealed. It is state of its own, since a prompt may contain the
    mask token. kv_pages [layers, 2, pages, P, HK, D].
    """

    def __init__(
        self, model: LLaDA, config: EngineConfig, num_pages: int, eos_ids: list[int], last_ids: list[int]
    ) -> None:
        self.model = model
        self.config = config
        self.device = config.device
        self.stats = EngineStats()
        shape = (config.max_num_seqs, config.max_model_len)
        self.tokens = torch.full(shape, config.mask_token_id, device=self.device)
        self.masked = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.kv_pages = torch.empty(
            (*page_shape(model, config.page_size)[:2], num_pages, *page_shape(model, config.page_size)[2:]),
            dtype=config.dtype,
            device=self.device,
        )
        # what logits_eos_inf forbids, and what confidence_eos_eot_inf puts last
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.int64, device=self.device)
        self.last_ids = torch.tensor(last_ids, dtype=torch.int64, device=self.device)

    def start(self, sequence: Sequence) -> None:
        """Writes the tokens of a sequence that was given a slot; all from its current block on is masked."""
        known = torch.tensor(sequence.prompt_token_ids + sequence.output_token_ids, device=self.device)
        row = slice(sequence.block_start, sequence.canvas_end)
        self.tokens[sequence.slot, : len(known)] = known
        self.tokens[sequence.slot, row] = self.config.mask_token_id
        self.masked[sequence.slot] = False
        self.masked[sequence.slot, row] = True

    def block_tokens(self, sequence: Sequence) -> list[int]:
        """The tokens of the sequence's current block."""
        return self.tokens[sequence.slot, sequence.block_start : sequence.block_end].tolist()

    @torch.inference_mode()
    def run(self, scheduled: list[ScheduledSequence]) -> list[int]:
        """One denoising step of every scheduled sequence -> the masked positions left in each one's block."""
        batch = build_batch(scheduled, self.config.page_size, self.device)
        sequences = [entry.sequence for entry in scheduled]
        hidden = self.model(self.tokens[batch.slots, batch.positions], batch.positions, self.kv_pages, batch.segments)
        self.stats.forwards += 1
        self.stats.rows += len(batch.positions)

        # Blocks are padded to one width: [B, L]. Padding repeats the block's last position and is never masked.
        offsets = torch.arange(int(batch.block_lengths.max()), device=self.device)
        inside = offsets < batch.block_lengths[:, None]
        offsets = offsets.minimum(batch.block_lengths[:, None] - 1)
        where = (batch.block_slots[:, None], batch.block_starts[:, None] + offsets)
        masked = self.masked[where] & inside
        token_ids = self.tokens[where]
        confidence = torch.zeros(masked.shape, device=self.device)
        block, offset = masked.nonzero(as_tuple=True)
        rows = batch.block_rows[block] + offset
        token_ids[masked], confidence[masked] = self._predict(hidden[rows], sequences, block, offset)
        reveal = self._reveal(sequences, confidence, masked)
        block, offset = reveal.nonzero(as_tuple=True)
        where = (batch.block_slots[block], batch.block_starts[block] + offset)
        self.tokens[where] = token_ids[reveal]
        self.masked[where] = False
        return (masked & ~reveal).sum(dim=-1).tolist()

    def _predict(
        self, hidden: torch.Tensor, sequences: list[Sequence], block: torch.Tensor, offset: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [N, d] of the masked rows; block, offset [N]: which block, where in it -> token_ids, confidence [N]."""
        self.stats.lm_head_rows += len(hidden)
        per_block = _BlockOptions(sequences, self.device)
        chunks = []
        for rows in torch.arange(len(hidden), device=self.device).split(_LM_HEAD_ROWS):
            logits = self.model.logits(hidden[rows])
            owner = block[rows]
            if per_block.any_eos_inf:
                logits[per_block.eos_inf[owner, None] & torch.isin(_columns(logits), self.eos_ids)] = -torch.inf
            noise = per_block.noise(owner, offset[rows]) if per_block.any_noise else None
            vocab_size = self.model.config.vocab_size
            chunks.append(token_confidence(logits, vocab_size, self.config.mask_token_id, noise))
        token_ids, confidence = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        last = per_block.eos_eot_last[block] & torch.isin(token_ids, self.last_ids)
        return token_ids, confidence.masked_fill(last, -torch.inf)

    def _reveal(self, sequences: list[Sequence], confidence: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """confidence, masked [B, L] -> the positions to reveal, each block by its own rule."""
        count = torch.tensor([sequence.reveal_count() for sequence in sequences], device=self.device)
        value = torch.tensor([sequence.params.rule_value for sequence in sequences], device=self.device)
        last = torch.tensor([sequence.is_last_step() for sequence in sequences], device=self.device)
        reveal = masked & last[:, None]
        for name in {sequence.params.unmasking for sequence in sequences}:
            mine = [i for i, sequence in enumerate(sequences) if sequence.params.unmasking == name]
            mine = torch.tensor(mine, device=self.device)
            reveal[mine] |= RULES[name].reveal(confidence[mine], masked[mine], count[mine], value[mine])
        return reveal


class _BlockOptions:
    """The options of B blocks that bear on their predictions, each a tensor [B]."""

    def __init__(self, sequences: list[Sequence], device: torch.device) -> None:
        params = [sequence.params for sequence in sequences]
        self.any_eos_inf = any(p.logits_eos_inf for p in params)
        self.any_noise = any(p.temperature > 0 for p in params)
        self.eos_inf = torch.tensor([p.logits_eos_inf for p in params], device=device)
        self.eos_eot_last = torch.tensor([p.confidence_eos_eot_inf for p in params], device=device)
        self.temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device)
        # a 64-bit seed as the int64 of the same bits
        seeds = [sequence.seed - 2**64 if sequence.seed >= 2**63 else sequence.seed for sequence in sequences]
        self.seed = torch.tensor(seeds, device=device)
        self.output_start = torch.tensor([len(sequence.output_token_ids) for sequence in sequences], device=device)
        self.step = torch.tensor([sequence.step for sequence in sequences], device=device)

    def noise(self, block: torch.Tensor, offset: torch.Tensor) -> RowNoise:
        """For rows at `offset` [N] of block `block` [N]."""
        return RowNoise(self.temperature[block], self.seed[block], self.output_start[block] + offset, self.step[block])


def page_shape(model: LLaDA, page_size: int) -> tuple[int, int, int, int, int]:
    """(layers, 2, P, HK, D): what one page of the KV cache holds, in elements of the model's dtype."""
    config = model.config
    return config.n_layers, 2, page_size, config.n_kv_heads, config.head_dim


def _columns(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(logits.shape[1], device=logits.device)
