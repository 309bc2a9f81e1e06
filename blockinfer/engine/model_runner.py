"""The device's side of a step: forward, confidence, unmasking, and the tokens and KV pages they act on."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from blockinfer.config import EngineConfig
from blockinfer.decoding.unmasking import RULES
from blockinfer.engine.batch import build_batch
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence
from blockinfer.kernels import philox
from blockinfer.kernels.backend import runs_triton
from blockinfer.kernels.confidence import RowNoise, token_confidence
from blockinfer.models.llada import LLaDA

# Rows that go through the LM head at once, which bounds the memory of what has a column for every token: at 126,464
# columns about 0.3 GB, in float32 and with noise, for which the PyTorch twin needs ten times as much.
_LM_HEAD_ROWS, _NOISY_LM_HEAD_ROWS = 256, 32


@dataclass
class EngineStats:
    """Counts since the engine was made: model launches, rows in them, rows through the LM head."""

    forwards: int = 0
    rows: int = 0
    lm_head_rows: int = 0


class ModelRunner:
    """Owns the token state and the KV pages.

    tokens [slots, max_model_len] int64: prompt, revealed tokens, and the mask token where nothing is revealed yet.
    masked, of that shape, bool: what is still to be revealed, from a sequence's current block on; before it, anything.
    It is state of its own, since a prompt may contain the mask token. kv_pages [layers, 2, pages, P, HK, D].
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
        self.num_pages = num_pages
        self.kv_pages = _allocate_pages(model, config, num_pages)
        # what logits_eos_inf forbids, and what confidence_eos_eot_inf puts last
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.int64, device=self.device)
        self.last_ids = torch.tensor(last_ids, dtype=torch.int64, device=self.device)

    def start(self, sequence: Sequence) -> None:
        """Writes the tokens of a sequence that was given a slot; all from its current block on is masked."""
        known = torch.tensor(sequence.prompt_token_ids + sequence.output_token_ids, device=self.device)
        row = slice(sequence.block_start, sequence.canvas_end)
        self.tokens[sequence.slot, : len(known)] = known
        self.tokens[sequence.slot, row] = self.config.mask_token_id
        self.masked[sequence.slot, row] = True

    def block_tokens(self, sequence: Sequence) -> list[int]:
        """The tokens of the sequence's current block."""
        return self.tokens[sequence.slot, sequence.block_start : sequence.block_end].tolist()

    @torch.inference_mode()
    def run(self, scheduled: list[ScheduledSequence]) -> list[int]:
        """One denoising step of every scheduled sequence -> the masked positions left in each one's block.

        Raises FloatingPointError, naming the requests, where logits are NaN or infinite.
        """
        batch = build_batch(scheduled, self.config.page_size, self.device)
        sequences = [entry.sequence for entry in scheduled]
        hidden = self.model(self.tokens[batch.slots, batch.positions], batch.positions, self.kv_pages, batch.segments)
        self.stats.forwards += 1
        self.stats.rows += len(batch.positions)
        for sequence in sequences:
            sequence.ran(self.stats.forwards)

        # Blocks are padded to one width: [B, L]. Padding repeats the block's last position and is never masked.
        offsets = torch.arange(int(batch.block_lengths.max()), device=self.device)
        inside = offsets < batch.block_lengths[:, None]
        offsets = offsets.minimum(batch.block_lengths[:, None] - 1)
        where = (batch.block_slots[:, None], batch.block_starts[:, None] + offsets)
        masked = self.masked[where] & inside
        block, offset = masked.nonzero(as_tuple=True)
        options = _BlockOptions(sequences, self.device)
        predicted = self._predict(hidden[batch.block_rows[block] + offset], options, block, offset)
        reveal = torch.zeros_like(masked)
        for name in {sequence.params.unmasking for sequence in sequences}:
            scores = torch.zeros(masked.shape, device=self.device)
            scores[masked] = self._scores(RULES[name].score, predicted, options, block, offset)
            mine = options.uses_rule(name)
            reveal |= RULES[name].select(scores, masked, options.count, options.value) & mine[:, None]
        reveal |= masked & options.last_step[:, None]

        revealed = reveal[masked]
        where = (batch.block_slots[block[revealed]], (batch.block_starts[block] + offset)[revealed])
        self.tokens[where] = predicted.token_ids[revealed]
        self.masked[where] = False
        return (masked & ~reveal).sum(dim=-1).tolist()

    def _predict(
        self, hidden: torch.Tensor, options: "_BlockOptions", block: torch.Tensor, offset: torch.Tensor
    ) -> "_Predicted":
        """hidden [N, d] of masked rows; block, offset [N]: which block each is of, and where in it."""
        self.stats.lm_head_rows += len(hidden)
        vocab_size, mask_token_id = self.model.config.vocab_size, self.config.mask_token_id
        size = _NOISY_LM_HEAD_ROWS if options.any_noise and not runs_triton(hidden) else _LM_HEAD_ROWS
        chunks = []
        for rows in torch.arange(len(hidden), device=self.device).split(size):
            logits = self.model.logits(hidden[rows])
            if options.any_eos_inf:
                # added, not assigned: a broken model's NaN or +inf there becomes NaN and is still noticed
                forbidden = torch.where(options.eos_inf[block[rows]], -torch.inf, 0.0)
                logits[:, self.eos_ids] += forbidden[:, None]
            noise = options.noise(block[rows], offset[rows]) if options.any_noise else None
            chunks.append(token_confidence(logits, vocab_size, mask_token_id, noise, options.any_entropy))
        token_ids, confidence, entropy, finite = zip(*chunks, strict=True)
        self._check_finite(torch.cat(finite), options, block)
        return _Predicted(
            torch.cat(token_ids), torch.cat(confidence), torch.cat(entropy) if options.any_entropy else None
        )

    def _check_finite(self, finite: torch.Tensor, options: "_BlockOptions", block: torch.Tensor) -> None:
        """Raises FloatingPointError for rows [N] that are not finite: their tokens would mean nothing.

        `token_confidence` defines a token even then; the engine rather says that the model is broken.
        """
        if not finite.all():
            ids = sorted({options.request_ids[i] for i in block[~finite].tolist()})
            raise FloatingPointError(
                f"the model's logits are NaN or infinite for request {', '.join(map(str, ids))}: its activations "
                f"overflow {self.config.dtype} or its weights are damaged; abort it, or load with a wider dtype"
            )

    def _scores(
        self,
        score: str,
        predicted: "_Predicted",
        options: "_BlockOptions",
        block: torch.Tensor,
        offset: torch.Tensor,
    ) -> torch.Tensor:
        """What an unmasking rule ranks the masked rows by, [N] float32 (decoding.unmasking.Rule.score)."""
        if score == "position":
            return -offset.float()
        if score == "confidence":
            scores = predicted.confidence
        elif score == "certainty":
            scores = -predicted.entropy
        else:
            scores = options.uniform(block, offset)
        last = options.eos_eot_last[block] & torch.isin(predicted.token_ids, self.last_ids)
        return scores.masked_fill(last, -torch.inf)


class _Predicted(NamedTuple):
    """For each of N masked rows: the token, its confidence, and, where a rule reads it, the entropy."""

    token_ids: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor | None


class _BlockOptions:
    """What the B sequences' options say of their blocks in this step, each a tensor [B]."""

    def __init__(self, sequences: list[Sequence], device: torch.device) -> None:
        params = [sequence.params for sequence in sequences]
        self.request_ids = [sequence.request_id for sequence in sequences]
        self._rules = [p.unmasking for p in params]
        self._device = device
        self.any_eos_inf = any(p.logits_eos_inf for p in params)
        self.any_noise = any(p.temperature > 0 for p in params)
        self.any_entropy = any(RULES[name].score == "certainty" for name in self._rules)
        self.eos_inf = torch.tensor([p.logits_eos_inf for p in params], device=device)
        self.eos_eot_last = torch.tensor([p.confidence_eos_eot_inf for p in params], device=device)
        self.count = torch.tensor([sequence.reveal_count() for sequence in sequences], device=device)
        self.value = torch.tensor([p.rule_value for p in params], device=device)
        self.last_step = torch.tensor([sequence.is_last_step() for sequence in sequences], device=device)
        self.temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device)
        # a 64-bit seed as the int64 of the same bits
        seeds = [sequence.seed - 2**64 if sequence.seed >= 2**63 else sequence.seed for sequence in sequences]
        self.seed = torch.tensor(seeds, device=device)
        self.output_start = torch.tensor([len(sequence.output_token_ids) for sequence in sequences], device=device)
        self.step = torch.tensor([sequence.step for sequence in sequences], device=device)

    def uses_rule(self, name: str) -> torch.Tensor:
        return torch.tensor([rule == name for rule in self._rules], device=self._device)

    def noise(self, block: torch.Tensor, offset: torch.Tensor) -> RowNoise:
        """The token noise of rows at `offset` [N] of block `block` [N]."""
        return RowNoise(self.temperature[block], self.seed[block], self.output_start[block] + offset, self.step[block])

    def uniform(self, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The random rule's numbers for the same, [N] float32."""
        step = self.step[block]
        position = self.output_start[block] + offset
        return philox.uniform(self.seed[block], philox.RULE_NOISE, position, step, torch.zeros_like(step)).float()


def page_shape(model: LLaDA, page_size: int) -> tuple[int, int, int, int, int]:
    """(layers, 2, P, HK, D): what one page of the KV cache holds, in elements of the model's dtype."""
    config = model.config
    return config.n_layers, 2, page_size, config.n_kv_heads, config.head_dim


def _allocate_pages(model: LLaDA, config: EngineConfig, num_pages: int) -> torch.Tensor:
    """[layers, 2, pages, P, HK, D], not filled. Raises ValueError where the memory is not there."""
    layers, two, *page = page_shape(model, config.page_size)
    shape = (layers, two, num_pages, *page)
    try:
        return torch.empty(shape, dtype=config.dtype, device=config.device)
    except RuntimeError as error:
        size = math.prod(shape) * config.dtype.itemsize
        raise ValueError(
            f"the KV cache of {size} bytes cannot be allocated on {config.device}; lower kv_cache_memory, or "
            f"max_num_seqs={config.max_num_seqs} and max_model_len={config.max_model_len}: {error}"
        ) from error
