"""The device's side of a step: forward, confidence, unmasking, and the tokens and KV pages they use."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from blockinfer.config import EngineConfig
from blockinfer.decoding.windows import MAX_OPEN_BLOCKS
from blockinfer.engine.batch import (
    StepInputs,
    denoised,
    layout,
    pack,
    pack_steps,
    packed_size,
    slot_options,
    step_columns,
)
from blockinfer.engine.editing import edit, edited_rows
from blockinfer.engine.graphs import ROW_TILE, StepGraphs, default_sizes
from blockinfer.engine.kv_pages import allocate_pages
from blockinfer.engine.logprobs import RevealedLogprobs
from blockinfer.engine.resident import Resident
from blockinfer.engine.scheduler import ScheduledSequence
from blockinfer.engine.score_reader import ScoreReader
from blockinfer.engine.scoring import Scores
from blockinfer.engine.sequence import Sequence
from blockinfer.engine.shadows import guidance_of_blocks, show_shadows
from blockinfer.engine.stats import EngineStats
from blockinfer.engine.transfer import write
from blockinfer.kernels.backend import runs_triton
from blockinfer.kernels.confidence import Confidence, RowOptions, Vocabulary, token_confidence
from blockinfer.kernels.guidance import Guidance, guide
from blockinfer.kernels.masked_rows import masked_rows
from blockinfer.kernels.segments import Cutting, Scratch, SegmentTable, make_scratch
from blockinfer.kernels.sharded_confidence import Shard, sharded_confidence
from blockinfer.kernels.slots import SlotOptions, SlotState
from blockinfer.kernels.unmasking import unmask
from blockinfer.kernels.wide_attention import with_wide
from blockinfer.models.transformer import Transformer

# Rows that go through the LM head at once, times the bytes of a number: that bounds the memory of what has a column for
# every token, 0.13 GB at 126,464 columns.
_COLUMN_BYTES = 1024


class BlockResult(NamedTuple):
    """A sequence's open blocks after a step. left: positions of each that are still masked.

    token_ids: of all their positions, the mask token where masked; only if a block may have ended or the sequence is
    watched. broken: logits were NaN or infinite, so the rest means nothing; False if not read. logprobs: of each
    position, by token id; only if the request asks and a block may have ended.
    """

    left: list[int]
    token_ids: list[int] | None = None
    broken: bool = False
    logprobs: list[dict[int, tuple[float, int]]] | None = None


class ModelRunner:
    """Owns the token state and the KV pages.

    state: max_num_seqs + 1 slots of max_model_len positions. Its tokens are the prompt, the revealed tokens, and the
    mask token elsewhere; `masked` counts only from a sequence's current block on, and is kept separately because a
    prompt may contain the mask token. page_tables [slots, pages of max_model_len] int64: each sequence's pages.
    kv_pages [layers, 2, pages + 1, P, HK, D]. The last slot and the last page are scrap: padding rows use them, and
    their content is arbitrary.
    """

    def __init__(
        self, model: Transformer, config: EngineConfig, num_pages: int, eos_ids: list[int], last_ids: list[int]
    ) -> None:
        self.model = model
        self.config = config
        self.device = config.device
        self.stats = EngineStats()
        slots, length = config.max_num_seqs + 1, config.max_model_len
        ints = dict(dtype=torch.int64, device=self.device)
        self.state = SlotState(
            tokens=torch.full((slots, length), config.mask_token_id, device=self.device),
            masked=torch.zeros((slots, length), dtype=torch.bool, device=self.device),
            broken=torch.zeros(slots, dtype=torch.bool, device=self.device),
            options=torch.zeros((slots, len(SlotOptions._fields)), **ints),
        )
        self.num_pages = num_pages
        self.kv_pages = allocate_pages(model, config, num_pages + 1)
        self.page_tables = torch.full((slots, -(-length // config.page_size)), num_pages, device=self.device)
        self._num_pages_known = [0] * slots
        # the tokens that logits_eos_inf forbids, and those that confidence_eos_eot_inf ranks last
        size = model.config.vocab_size
        self.eos_ids, self.last_ids = (
            torch.tensor([i for i in ids if i < size], **ints) for ids in (eos_ids, last_ids)
        )
        self._vocabulary = Vocabulary(size, config.mask_token_id, self.eos_ids, self.last_ids)
        ranks = model.ranks
        self._shard = Shard.of(self._vocabulary, model.config.embedding_size // ranks.size, ranks.rank)
        self._logprobs = RevealedLogprobs(self.state, self._vocabulary, lambda rows: self._reveal.padded(rows))
        self._scores = ScoreReader(
            self._whole_logits, lambda rows: self._reveal.padded(rows), size, self.device, ranks.wait
        )
        self._cutting, self._scratch = self._make_attention()
        # the input indices of every step, and the layout that the present ones were made for
        self._blocks = most_blocks(config.max_num_seqs)
        rows = -(-config.max_num_batched_tokens // ROW_TILE) * ROW_TILE
        self._packed = torch.zeros(packed_size(self._blocks, rows, self._cutting), **ints)
        self._layout: tuple[int, list] | None = None
        self._any_wide = False
        # whether the host goes on while the device runs what was launched; the forward that `repeat` has begun
        self.is_asynchronous = runs_triton(self.kv_pages)
        self.begun: list[ScheduledSequence] | None = None
        # output of the layers for `_run_reveal`, and its output for the host
        self._attended, self._residual = (
            torch.zeros((rows, width), dtype=config.dtype, device=self.device)
            for width in (model.n_heads * model.config.head_dim, model.config.d_model)
        )
        self._result = torch.zeros(2 * self._blocks + config.max_num_seqs * length, **ints)
        sizes = self._capture_sizes()
        self._layers = StepGraphs(self._run_layers, sizes)
        self._reveal = StepGraphs(lambda size, cut: self._run_reveal(size), sizes)
        # Only for steps with wide segments: in other steps their kernel would cost 1.5 us a layer for no work.
        wide_sizes = [size for size in sizes if self._cutting.wide_rows and size >= self._cutting.least_wide]
        self._layers_with_wide = StepGraphs(partial(self._run_layers, may_be_wide=True), wide_sizes)
        self._graphs = self._layers, self._layers_with_wide, self._reveal

    def _make_attention(self) -> tuple[Cutting, Scratch | None]:
        heads, head_dim = (self.model.n_heads, self.model.n_kv_heads), self.model.config.head_dim
        of_model = head_dim, self.config.page_size, self.config.dtype, self.device
        if not runs_triton(self.kv_pages):
            # the PyTorch twin processes a segment at once
            return with_wide(Cutting(self.config.max_num_batched_tokens, 1), *of_model), None
        cutting = with_wide(Cutting.of(*heads, self.device), *of_model)
        return cutting, make_scratch(cutting, *heads, head_dim, self.device)

    def _capture_sizes(self) -> list[int]:
        """Empty if kernels are launched one by one: with PyTorch's twins, or with enforce_eager."""
        if self.config.enforce_eager or not runs_triton(self.kv_pages):
            return []
        return self.config.cudagraph_capture_sizes or default_sizes(self.config.max_num_batched_tokens)

    @torch.inference_mode()
    def capture(self) -> None:
        """Runs everything that a step may run, and captures the graphs, on indices without tiles or blocks. All ranks
        call it together, once each has its memory. Does nothing if kernels are launched one by one."""
        number = sum(graphs.number for graphs in self._graphs)
        if not number:
            return
        start = time.perf_counter()
        # allocate what the largest steps need before capturing
        rows = len(self._attended)
        self._run_layers(rows)
        if self._cutting.wide_rows:
            self._run_layers(rows, may_be_wide=True)
        self._run_reveal(max(self._layers.padded(1), min(rows, self.config.max_num_seqs * self.config.max_model_len)))
        self._scores.log_probabilities([0], [0], None)
        self.model.ranks.wait()
        free = self._free_memory()
        pool = torch.cuda.graph_pool_handle()
        with tqdm(total=number, desc="CUDA graphs", unit="graph", dynamic_ncols=True) as progress:
            for graphs in self._graphs:
                graphs.capture(pool, progress.update, self.model.ranks.wait)
        self.stats.graphs = number
        self.stats.graph_bytes = free - self._free_memory()
        self.stats.capture_seconds = time.perf_counter() - start

    def drop_graphs(self) -> None:
        """NCCL hangs if a communicator is destroyed before a graph that captured a use of it."""
        for graphs in self._graphs:
            graphs.drop()

    def _free_memory(self) -> int:
        """Bytes of the GPU that are neither used nor cached by torch's allocator."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def start(self, sequence: Resident) -> None:
        """Writes the tokens of a sequence that has just got its slots; from its current block on all is masked, except
        given tokens."""
        self._start_lane(sequence, sequence.slot, sequence.known_token_ids())
        if sequence.guided:
            self._start_lane(sequence, sequence.shadow_slot, sequence.shadow_token_ids())
        if not isinstance(sequence, Sequence):
            return
        self.state.masked[sequence.slot, sequence.block_start : sequence.canvas_end] = True
        standing = sequence.standing_token_ids()
        if standing:
            self._write_tokens(sequence.slot, sequence.block_start, standing)
            part = slice(sequence.block_start, sequence.block_start + len(standing))
            write(self.state.masked[sequence.slot, part], [token is None for token in standing])
            if sequence.guided:
                show_shadows(self.state, [sequence])
        self.state.broken[sequence.slot].fill_(False)
        write(self.state.options[sequence.slot], slot_options(sequence))
        self._logprobs.start(sequence)

    def _start_lane(self, sequence: Resident, slot: int, known: list[int | None]) -> None:
        self._write_tokens(slot, 0, known)
        self.state.tokens[slot, len(known) : sequence.canvas_end] = self.config.mask_token_id
        self._num_pages_known[slot] = 0

    def _write_tokens(self, slot: int, start: int, tokens: list[int | None]) -> None:
        """Writes the mask token for None."""
        mask = self.config.mask_token_id
        write(self.state.tokens[slot, start : start + len(tokens)], [mask if t is None else t for t in tokens])

    @torch.inference_mode()
    def run(self, scheduled: list[ScheduledSequence]) -> tuple[list[BlockResult], Scores | None]:
        """One step of every scheduled sequence -> the result for each sequence with open blocks, and the scores of the
        others, if any.

        Waits for the device only if a block ends (its tokens may include a stop token), a rule has no schedule, several
        blocks may be open, or a canvas is watched. Otherwise the step is still running, or queued on the one stream:
        later work on its slots and pages, which may belong to another sequence by then, runs after it.
        """
        if scheduled is not self.begun:
            self._begin(scheduled)
        self.begun = None
        self.stats.forwards += 1
        self.stats.rows += sum(entry.plan.rows for entry in scheduled)
        self.stats.keys += sum(sequence.lanes * plan.kv_len for sequence, plan in scheduled)
        for sequence, _ in scheduled:
            sequence.ran(self.stats.forwards)
        # the device is busy: do not wait for the rest
        sequences = [sequence for sequence, _ in denoised(scheduled)]
        scores = None
        if len(sequences) < len(scheduled):
            scores = self._scores.read(scheduled)
            self.stats.lm_head_rows += sum(row.lanes * len(row.reads) for row in scores.rows)
        return (self._denoise(scheduled, sequences) if sequences else []), scores

    def repeat(self, scheduled: list[ScheduledSequence]) -> None:
        """Begins the next step of the sequences that `run` has just been given, if their plans are the same again: the
        GPU need not wait until the host has evaluated the last step. `run` completes it when it gets this list again;
        if it gets another one, this forward was for nothing.
        """
        self._launch()
        self.begun = scheduled

    def _denoise(self, scheduled: list[ScheduledSequence], sequences: list[Sequence]) -> list[BlockResult]:
        """The rest of the step, after the layers, for the sequences that have blocks."""
        expected = [sequence.masked_after_step() for sequence in sequences]
        predicted = sum(sequence.num_predicted for sequence in sequences)
        write(self._packed[step_columns(self._blocks)], pack_steps(scheduled, self._blocks))
        observed = self._logprobs.before(scheduled)
        edited = edited_rows(scheduled)
        if edited:
            edit(edited, self._reveal.padded(len(edited)), self.state, self._predict)
            self.stats.lm_head_rows += len(edited)
        size = self._reveal.padded(max(1, predicted))
        guided = [sequence for sequence in sequences if sequence.guided]
        if guided:
            self._run_reveal(size, guidance_of_blocks(scheduled, size, self.device))
            show_shadows(self.state, guided)
        else:
            self._reveal(size)
        self._logprobs.after(observed, self._whole_logits)
        self.stats.lm_head_rows += sum(sequence.lanes * sequence.num_predicted for sequence in sequences)
        if all(expected):
            return [BlockResult([left]) for left in expected]
        return self._read(sequences)

    def _read(self, sequences: list[Sequence]) -> list[BlockResult]:
        """Waits for the step's result."""
        self.model.ranks.wait()
        start, block = 2 * self._blocks, 0
        total = sum(sequence.block_end - sequence.block_start for sequence in sequences)
        values = self._result[: start + total].tolist()
        results = []
        for sequence in sequences:
            stop, last = start + sequence.block_end - sequence.block_start, block + len(sequence.window)
            broken, left = values[2 * block], values[2 * block + 1 : 2 * last : 2]
            may_end = not left[0] or sequence.has_several_blocks
            token_ids = values[start:stop] if may_end or sequence.is_watched else None
            logprobs = self._logprobs.read(sequence) if may_end else None
            results.append(BlockResult(left, token_ids, bool(broken), logprobs))
            start, block = stop, last
        return results

    def _begin(self, scheduled: list[ScheduledSequence]) -> None:
        """All layers on the scheduled rows."""
        self._write_page_tables(scheduled)
        self._write_inputs(scheduled, self._layers.padded(sum(entry.plan.rows for entry in scheduled)))
        self._launch()

    @torch.inference_mode()
    def _launch(self) -> None:
        """All layers, for the inputs that are written."""
        rows, _ = self._layout
        (self._layers_with_wide if self._any_wide else self._layers)(rows)

    def _write_inputs(self, scheduled: list[ScheduledSequence], rows: int) -> None:
        """Writes StepInputs for `rows` rows, except `step_columns`; unchanged between the steps of a block."""
        wanted = rows, layout(scheduled)
        if wanted == self._layout:
            return
        self._layout = None  # in case Ctrl-C comes before the last line
        packed = pack(scheduled, self._blocks, rows, self.config.max_num_seqs, self._cutting)
        write(self._packed[: len(packed)], packed)
        self._any_wide = bool(packed[1])
        self._layout = wanted

    def _write_page_tables(self, scheduled: list[ScheduledSequence]) -> None:
        """A running sequence's pages only grow until it is started anew, so only new pages are written."""
        for sequence, _ in scheduled:
            self._write_page_table(sequence.slot, sequence.pages)
            if sequence.guided:
                self._write_page_table(sequence.shadow_slot, sequence.shadow_pages)

    def _write_page_table(self, slot: int, pages: list[int]) -> None:
        known = self._num_pages_known[slot]
        if known < len(pages):
            write(self.page_tables[slot, known : len(pages)], pages[known:])
            self._num_pages_known[slot] = len(pages)

    def _run_layers(self, rows: int, cut: Callable[[], None] | None = None, may_be_wide: bool = False) -> None:
        """All layers, up to the last one's attention, on the step's rows padded to `rows`; writes K and V. cut: where
        its graph may end. may_be_wide: whether there may be tiles of wide segments.

        Launches the same kernels for the same number of rows and never waits for the device, so that it can be
        captured.
        """
        inputs = StepInputs.split(self._packed, self._blocks, rows)
        page_size = self.config.page_size
        pages = self.page_tables[inputs.slots, inputs.positions // page_size]
        table = SegmentTable(
            tiles=inputs.tiles,
            num_tiles=inputs.num_tiles,
            page_tables=self.page_tables,
            kv_slots=pages * page_size + inputs.positions % page_size,
            scratch=self._scratch if self._cutting.may_split(rows) else None,
            may_be_wide=may_be_wide,
        )
        token_ids = self.state.tokens[inputs.slots, inputs.positions]
        attended, residual = self._attended[:rows], self._residual[:rows]
        self.model(token_ids, inputs.positions, self.kv_pages, table, attended, residual, cut)

    def _run_reveal(self, size: int, guidance: Guidance | None = None) -> None:
        """Predicts the masked rows, padded to `size`, and applies the unmasking rules, down to the result.

        Can be captured, as `_run_layers`, but not with guidance, which has `size` rows.
        """
        blocks = StepInputs.split(self._packed, self._blocks, 0).blocks
        rows, options = masked_rows(self.state, blocks, size)
        predicted = self._predict(rows.row, options, guidance)
        unmask(predicted, rows, self.state, blocks, self._result)

    def _logits(self, rows: torch.Tensor, guidance: Guidance | None = None) -> torch.Tensor:
        """rows [N] of the last forward -> logits for this rank's share of the vocabulary, [N, columns], guided if asked
        for."""
        logits = self.model.logits(self._attended, self._residual, rows)
        if guidance is None:
            return logits
        shadow = self.model.logits(self._attended, self._residual, rows + guidance.shift)
        return guide(logits, shadow, guidance.scale)

    def _whole_logits(self, rows: torch.Tensor, guidance: Guidance | None = None) -> torch.Tensor:
        """`_logits` gathered from all ranks, [N, embedding_size]; for options that few requests use."""
        return self.model.ranks.gather_columns(self._logits(rows, guidance))

    def _confidence(self, logits: torch.Tensor, options: RowOptions) -> Confidence:
        if self.model.ranks.size == 1:
            return token_confidence(logits, self._vocabulary, options)
        return sharded_confidence(logits, self._shard, options, self.model.ranks)

    def _predict(self, rows: torch.Tensor, options: RowOptions, guidance: Guidance | None) -> Confidence:
        """rows [N]: of the forward; options: of each -> the prediction for each."""
        # the PyTorch twin computes in float32 at least
        size = _COLUMN_BYTES // (self.config.dtype.itemsize if runs_triton(self._residual) else 4)
        if guidance is not None:
            size = _COLUMN_BYTES // 4
        chunks = []
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            logits = self._logits(rows[chunk], guidance and Guidance(*(tensor[chunk] for tensor in guidance)))
            chunk_options = RowOptions(*(tensor[chunk] for tensor in options))
            chunks.append(self._confidence(logits, chunk_options))
        if len(chunks) == 1:
            return chunks[0]
        return Confidence(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def most_blocks(max_num_seqs: int) -> int:
    """The most blocks in a step, rounded up to an even number: one of each sequence, or MAX_OPEN_BLOCKS of one sequence
    and one of each other."""
    return (max_num_seqs + MAX_OPEN_BLOCKS) // 2 * 2
