"""The device's side of a step: forward, confidence, unmasking, and the tokens and KV pages they act on."""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import torch

from blockinfer.config import EngineConfig
from blockinfer.decoding.unmasking import RULES
from blockinfer.engine.batch import SlotOptions, StepInputs, StepShape, as_float, layout, pack, pack_steps, step_shape
from blockinfer.engine.graphs import GraphCache
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.sequence import Sequence
from blockinfer.kernels import philox
from blockinfer.kernels.backend import runs_triton
from blockinfer.kernels.confidence import Confidence, RowNoise, token_confidence
from blockinfer.kernels.paged_attention import SegmentTable
from blockinfer.kernels.unmasking import Blocks, MaskedRows, SlotState, masked_rows, unmask
from blockinfer.models.llada import LLaDA

# Rows that go through the LM head at once, times the bytes of a number. That bounds the memory of what has a column for
# every token: at 126,464 columns 0.3 GB in float32, and with noise, for which the PyTorch twin needs ten times as much.
_COLUMN_BYTES, _NOISY_COLUMN_BYTES = 1024, 128
# Above so many rows the GPU is busy for longer than the host takes to launch its kernels one by one.
_MAX_GRAPH_ROWS = 2048


@dataclass
class EngineStats:
    """Counts since the engine was made, without padding: model launches; rows in them; rows through the LM head; keys:
    cached positions that a launch attends to, those of a sequence once."""

    forwards: int = 0
    rows: int = 0
    lm_head_rows: int = 0
    keys: int = 0


class BlockResult(NamedTuple):
    """A sequence's block after a step: how many positions are still masked, and, where the result was read, its tokens.

    broken: its logits were NaN or infinite, and the rest means nothing; as far as was read.
    """

    masked_left: int
    token_ids: list[int] | None = None
    broken: bool = False


class ModelRunner:
    """Owns the token state and the KV pages.

    state: of max_num_seqs + 1 slots and max_model_len positions; its tokens are the prompt, the revealed ones, and the
    mask token where nothing is revealed yet; what is masked is meant from a sequence's current block on. It is state of
    its own, since a prompt may contain the mask token. page_tables [slots, pages of max_model_len] int64: each
    sequence's pages. kv_pages [layers, 2, pages + 1, P, HK, D]. The last slot and the last page are scrap: they take
    what pads a step, and hold anything.
    """

    def __init__(
        self, model: LLaDA, config: EngineConfig, num_pages: int, eos_ids: list[int], last_ids: list[int]
    ) -> None:
        self.model = model
        self.config = config
        self.device = config.device
        self.stats = EngineStats()
        slots, length = config.max_num_seqs + 1, config.max_model_len
        self._options = torch.zeros((slots, len(SlotOptions._fields)), dtype=torch.int64, device=self.device)
        options = SlotOptions(*self._options.unbind(1))
        self.state = SlotState(
            tokens=torch.full((slots, length), config.mask_token_id, device=self.device),
            masked=torch.zeros((slots, length), dtype=torch.bool, device=self.device),
            broken=torch.zeros(slots, dtype=torch.bool, device=self.device),
            rules=options.rule,
            values=options.value,
        )
        self.num_pages = num_pages
        self.kv_pages = _allocate_pages(model, config, num_pages + 1)
        self.page_tables = torch.full((slots, -(-length // config.page_size)), num_pages, device=self.device)
        self._num_pages_known = [0] * slots
        # what logits_eos_inf forbids, and what confidence_eos_eot_inf puts last
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.int64, device=self.device)
        self.last_ids = torch.tensor(last_ids, dtype=torch.int64, device=self.device)
        self._graphs = GraphCache() if self.device.type == "cuda" else None
        # where every graph finds its step's indices, and what those that are there depend on
        largest = StepInputs.largest(_MAX_GRAPH_ROWS, config.max_num_seqs)
        self._packed = torch.empty(largest, dtype=torch.int64, device=self.device)
        self._layout: tuple | None = None

    def start(self, sequence: Sequence) -> None:
        """Writes the tokens of a sequence that was given a slot; all from its current block on is masked."""
        row = slice(sequence.block_start, sequence.canvas_end)
        _write(self.state.tokens[sequence.slot, : row.start], sequence.prompt_token_ids + sequence.output_token_ids)
        self.state.tokens[sequence.slot, row] = self.config.mask_token_id
        self.state.masked[sequence.slot, row] = True
        self.state.broken[sequence.slot].fill_(False)
        self._num_pages_known[sequence.slot] = 0
        _write(self._options[sequence.slot], SlotOptions.of(sequence))

    @torch.inference_mode()
    def run(self, scheduled: list[ScheduledSequence]) -> list[BlockResult]:
        """One denoising step of every scheduled sequence -> what became of each one's block.

        Waits for the device only where a block ends, whose tokens may hold a stop token, and where a rule has no
        schedule. Otherwise the step is still under way or queued behind others, on one stream: what is done next to
        slots and pages, which may be another sequence's by then, is done after it.
        """
        sequences = [sequence for sequence, _ in scheduled]
        expected = [sequence.masked_after_step() for sequence in sequences]
        exact = step_shape(scheduled)
        padded = exact.padded(self.config.max_model_len)
        graphs = self._graphs if padded.rows <= _MAX_GRAPH_ROWS else None
        shape = padded if graphs else exact
        self._write_page_tables(sequences)
        inputs = self._write_inputs(scheduled, shape)
        if graphs is None:
            result = self._step(StepInputs.split(inputs, shape), shape)
        else:
            result = graphs.run(shape, lambda: self._step(StepInputs.split(inputs, shape), shape))
        self.stats.forwards += 1
        self.stats.rows += exact.rows
        self.stats.lm_head_rows += exact.masked_rows
        self.stats.keys += sum(max(segment.kv_len for segment in segments) for _, segments in scheduled)
        for sequence in sequences:
            sequence.ran(self.stats.forwards)
        if all(expected):
            return [BlockResult(left) for left in expected]
        return [
            BlockResult(left, token_ids[: sequence.block_end - sequence.block_start], bool(broken))
            for sequence, (broken, left, *token_ids) in zip(sequences, result.tolist(), strict=False)
        ]

    def _write_inputs(self, scheduled: list[ScheduledSequence], shape: StepShape) -> torch.Tensor:
        """Packed StepInputs on the device, of which most stay as they are from step to step of a block."""
        size = sum(StepInputs.sizes(shape))
        if size > len(self._packed):
            packed = pack(scheduled, shape, scrap_slot=self.config.max_num_seqs)
            return _pinned(packed, self.device).to(self.device, non_blocking=True)
        inputs = self._packed[:size]
        wanted = layout(scheduled, shape)
        if wanted == self._layout:
            _write(inputs[StepInputs.step_columns(shape)], pack_steps(scheduled, shape))
        else:
            self._layout = None  # should Ctrl-C come before the next line but one
            _write(inputs, pack(scheduled, shape, scrap_slot=self.config.max_num_seqs))
            self._layout = wanted
        return inputs

    def _write_page_tables(self, sequences: list[Sequence]) -> None:
        """A running sequence's pages are only ever added to, until it is started anew."""
        for sequence in sequences:
            known = self._num_pages_known[sequence.slot]
            if known < len(sequence.pages):
                _write(self.page_tables[sequence.slot, known : len(sequence.pages)], sequence.pages[known:])
                self._num_pages_known[sequence.slot] = len(sequence.pages)

    def _step(self, inputs: StepInputs, shape: StepShape) -> torch.Tensor:
        """-> [B, 2 + L] int64: whether the sequence is broken, the masked positions left, the block's tokens.

        Launches the same kernels for the same shape and never waits for the device, so that it can be captured.
        """
        blocks = inputs.blocks
        rows = masked_rows(self.state, blocks, shape.block_length, shape.masked_rows)
        hidden = self.forward(inputs, shape, rows.row)
        predicted = self._predict(hidden, blocks, shape, rows)
        result = torch.empty((shape.blocks, 2 + shape.block_length), dtype=torch.int64, device=self.device)
        # all scores first: if the memory of one is not there, nothing is revealed yet
        names = [name for name in RULES if name in shape.rules]
        scores = [self._scores(RULES[name].score, predicted, blocks, shape, rows) for name in names]
        for name, score in zip(names, scores, strict=True):
            unmask(name, score, predicted.token_ids, predicted.finite, self.state, blocks, result)
        return result

    def forward(self, inputs: StepInputs, shape: StepShape, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Writes the K and V of all rows -> their final hidden states, [T, d], or those of the given rows, [N, d]."""
        page_size = self.config.page_size
        pages = self.page_tables[inputs.slots, inputs.positions // page_size]
        table = SegmentTable(
            query_starts=inputs.query_starts,
            kv_lens=inputs.kv_lens,
            page_table=self.page_tables[inputs.segment_slots, : -(-shape.max_kv_len // page_size)],
            kv_slots=pages * page_size + inputs.positions % page_size,
        )
        token_ids = self.state.tokens[inputs.slots, inputs.positions]
        return self.model(token_ids, inputs.positions, self.kv_pages, table, rows)

    def _predict(self, hidden: torch.Tensor, blocks: Blocks, shape: StepShape, rows: MaskedRows) -> Confidence:
        """hidden [N, d] of the masked rows -> what each predicts."""
        noise = None
        if "noise" in shape.features:
            noise = self._row_noise(blocks, rows)
        with_entropy = any(RULES[name].score == "certainty" for name in shape.rules)
        twin = not runs_triton(hidden)  # which computes in float32 at least
        column_bytes = _NOISY_COLUMN_BYTES if noise and twin else _COLUMN_BYTES
        size = column_bytes // (max(hidden.itemsize, 4) if twin else hidden.itemsize)
        vocab_size, mask_token_id = self.model.config.vocab_size, self.config.mask_token_id
        if "eos_inf" in shape.features:
            forbidden = torch.where(self._row_options(blocks, rows).eos_inf > 0, -torch.inf, 0.0)
        chunks = []
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            logits = self.model.logits(hidden[chunk])
            if "eos_inf" in shape.features:
                # added, not assigned: a broken model's NaN or +inf there becomes NaN and is still noticed
                logits[:, self.eos_ids] += forbidden[chunk, None]
            chunk_noise = noise and RowNoise(*(tensor[chunk] for tensor in noise))
            chunks.append(token_confidence(logits, vocab_size, mask_token_id, chunk_noise, with_entropy))
        if len(chunks) == 1:
            return chunks[0]
        return Confidence(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)))

    def _scores(
        self, score: str, predicted: Confidence, blocks: Blocks, shape: StepShape, rows: MaskedRows
    ) -> torch.Tensor:
        """What an unmasking rule ranks the masked rows by, [N] float32 (decoding.unmasking.Rule.score)."""
        if score == "position":
            return -rows.offset.float()
        if score == "confidence":
            scores = predicted.confidence
        elif score == "certainty":
            scores = -predicted.entropy
        else:
            _, seed, position, step = self._row_noise(blocks, rows)
            scores = philox.uniform(seed, philox.RULE_NOISE, position, step, torch.zeros_like(step)).float()
        if "eos_eot_last" not in shape.features:
            return scores
        last = (predicted.token_ids[:, None] == self.last_ids).any(dim=-1)
        return scores.masked_fill(last & (self._row_options(blocks, rows).eos_eot_last > 0), -torch.inf)

    def _row_options(self, blocks: Blocks, rows: MaskedRows) -> SlotOptions:
        """Those of each masked row, [N]."""
        return SlotOptions(*self._options[blocks.slots[rows.block]].unbind(1))

    def _row_noise(self, blocks: Blocks, rows: MaskedRows) -> RowNoise:
        """What the noise of the masked rows [N] is a function of."""
        options = self._row_options(blocks, rows)
        position = blocks.output_starts[rows.block] + rows.offset
        return RowNoise(as_float(options.temperature), options.seed.contiguous(), position, blocks.steps[rows.block])


def _pinned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """values on the CPU, from where a copy to the device need not be waited for.

    The memory is torch's own, which gives it out again only when the copies from it are done.
    """
    return values.pin_memory() if device.type == "cuda" else values


def _write(target: torch.Tensor, values: Items[int] | torch.Tensor) -> None:
    """Copies int64 values of its shape into the target, behind what the device has yet to do, and waits for nothing."""
    values = torch.as_tensor(values, dtype=torch.int64)
    target.copy_(_pinned(values, target.device), non_blocking=True)


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
