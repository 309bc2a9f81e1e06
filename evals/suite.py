"""A session's measurements: the model, the rows as prompts, and each configuration's run."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from tqdm.auto import tqdm

from blockinfer import LLM, RequestOutput
from blockinfer.engine.block_causal import EXACT_MODE, check_block_causal, most_tokens
from evals.questions.graders import grade
from evals.questions.rows import encode
from evals.results.record import environment, extra_info, loading
from evals.results.samples import Samples
from evals.runs.configurations import REFERENCE_IMPL
from evals.runs.lanes import Lane, side_by_side
from evals.runs.reference_impl import ReferenceLLM
from evals.runs.resume import Generations, fingerprint, settings_hash
from evals.runs.rounds import Round, is_enough, record, steadiness
from evals.runs.run import Run
from evals.runs.settings import Case, Settings


class Suite:
    """The session's model and measurements: each configuration is run once, and graded on the same generations.

    timed: the configurations to be timed; on a CPU they run side by side.
    """

    # bypasses pytest's capture, so that a terminal shows the progress
    uncaptured: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(
        self,
        llm: LLM,
        settings: Settings,
        kept: Generations | None = None,
        timed: Sequence[Case] = (),
        samples: Samples | None = None,
    ) -> None:
        if llm.model_config.block_length is not None:
            for case in settings.cases:
                try:
                    check_block_causal(case.params)
                except ValueError as error:
                    option = ": --mode block" * (case.params.mode != EXACT_MODE)
                    raise ValueError(f"{llm.config.model}: {error}{option}") from error
        self.llm = llm
        self.reference = None
        if any(case.mode == REFERENCE_IMPL for case in settings.cases):
            self.reference = ReferenceLLM(llm)
        self.settings = settings
        self.timed = list(timed)
        self._seconds: dict[Case, list[float]] = {}
        self.loading = loading(llm)
        self.environment = environment(settings, llm.config.dtype, llm.config.quantization)
        self.runs: dict[Case, Run] = {}
        self.failed: dict[Case, Exception] = {}
        room = (most_tokens(llm.config, llm.model_config, case.params.block_length) for case in settings.cases)
        limit = min(room) - settings.max_tokens
        if limit < 1:
            raise ValueError(f"--max-tokens {settings.max_tokens} leaves no room for a prompt: {_room(llm)}")
        try:
            encoded = [encode(row, llm.tokenizer, limit, settings.ask) for row in settings.rows]
        except ValueError as error:
            raise ValueError(f"{error}: {_room(llm)}, --max-tokens asks for {settings.max_tokens} of it") from error
        self.prompts = [{"prompt_token_ids": token_ids} for token_ids, _ in encoded]
        self.truncated = sum(was_cut for _, was_cut in encoded)
        self.kept = kept
        self.samples = samples
        if samples is not None:
            self._asked = [llm.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids, _ in encoded]
        self._rows_of: dict[tuple[int, ...], list[int]] = {}
        for i, (token_ids, _) in enumerate(encoded):
            self._rows_of.setdefault(tuple(token_ids), []).append(i)
        self.found: dict[Case, list[RequestOutput | None]] = {}
        self.hashes: dict[Case, bytes] = {}
        if kept is not None:
            model = fingerprint(llm)
            # the reference's generations are not the engine's, though its params are those of vanilla
            names = {c: model + REFERENCE_IMPL * (c.mode == REFERENCE_IMPL) for c in settings.cases}
            self.hashes = {c: settings_hash(names[c], c.params) for c in settings.cases}
            self.found = {c: [kept.take(h, token_ids) for token_ids, _ in encoded] for c, h in self.hashes.items()}

    def close(self) -> None:
        """Frees the model's memory; the measurements stay."""
        self.llm.close()
        self.reference = None

    def measure(self, case: Case, benchmark: BenchmarkFixture | None) -> Run:
        """Runs a configuration again and again until its mean is known or the time is over, and gives its times to
        `benchmark`. On a CPU all timed configurations of its rule run side by side, at the first one's call.

        Without a benchmark it is run once. Raises what the engine or a grader raises.
        """
        if benchmark is None:
            self._seconds_of(case, timed=False)
        else:
            record(benchmark, partial(self._seconds_of, case, timed=True))
        if case in self.failed:
            raise self.failed[case]
        return self.runs[case]

    def _seconds_of(self, case: Case, timed: bool) -> list[float]:
        """Of its rounds, which are made now or were made with another's."""
        if case not in self._seconds:
            together = [case]
            if self._has_lanes and timed and case in self.timed:
                # ratios are of configurations with one rule
                together = [other for other in self.timed if other.unmasking == case.unmasking]
            self._measure(together, repeated=timed)
        return self._seconds.pop(case)

    @property
    def _has_lanes(self) -> bool:
        """Whether configurations run side by side: on a CPU, where one process has all of the model."""
        return self.settings.device == "cpu" and self.settings.tensor_parallel_size == 1

    def _measure(self, cases: list[Case], repeated: bool) -> None:
        """Fills `runs`, or `failed`, and the seconds that `measure` passes on."""
        takes = [_Take(case, list(self.found.get(case, [None] * len(self.prompts)))) for case in cases]
        with self.uncaptured():
            if self.kept is not None and not self.runs:
                print(f"\n{self.resume_line()}")
            for take in takes:
                with self._failing(take):
                    self._write_found(take)
                    # a resumed run is not timed: only the rest of it runs
                    self._generate(take) if take.resumed else self._warm_up(take)
            fresh = [take for take in takes if not take.resumed and take.case not in self.failed]
            while fresh:
                if len(fresh) > 1:
                    self._generate_side_by_side(fresh)
                else:
                    with self._failing(fresh[0]):
                        self._generate(fresh[0])
                fresh = [take for take in fresh if take.case not in self.failed]
                if not repeated or self._are_enough(fresh):
                    break
        for take in takes:
            self._seconds[take.case] = [r.seconds for r in steadiness(take.rounds).rounds]
            if take.case not in self.failed:
                with self._failing(take):
                    self.runs[take.case] = run = self._run(take)
                    if self.samples is not None:
                        self.samples.settle(run, self.settings.rows, self._asked)

    @contextmanager
    def _failing(self, take: "_Take") -> Iterator[None]:
        """An exception fails only this configuration: the others continue."""
        try:
            yield
        except Exception as error:
            self.failed[take.case] = error

    def _are_enough(self, takes: list["_Take"]) -> bool:
        """All have as many rounds as the slowest one."""
        limits = self.settings.max_seconds, self.settings.relative_error
        late = any(is_enough(take.rounds, limits[0], 0.0) for take in takes)
        return late or all(is_enough(take.rounds, *limits) for take in takes)

    def _warm_up(self, take: "_Take") -> None:
        """One batch, one step a block."""
        params = dataclasses.replace(take.case.params, denoising_steps=1)
        start = time.perf_counter()
        self._llm(take).generate(self.prompts[: self.settings.batch_size], params, use_tqdm=False)
        take.first_seconds = time.perf_counter() - start
        if self.settings.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _generate(self, take: "_Take") -> None:
        """A round of one configuration: in the first one the prompts without a generation, then all."""
        llm, missing = self._llm(take), take.missing
        keep = self._keep(take)
        before, start = llm.stats, time.perf_counter()
        # ends with the token ids on the host, so the device is done
        made = llm.generate(
            [self.prompts[i] for i in missing],
            take.case.params,
            use_tqdm=sys.stderr.isatty(),
            on_finish=keep,
        )
        seconds, after = time.perf_counter() - start, llm.stats
        counts = [getattr(after, name) - getattr(before, name) for name in ("forwards", "graphs", "compiled")]
        take.add(Round(seconds, *counts), made)

    def _generate_side_by_side(self, takes: list["_Take"]) -> None:
        """A round of every configuration, a part of each at a time."""
        prompts = len(takes) * len(self.prompts)
        with tqdm(total=prompts, disable=not sys.stderr.isatty(), unit="request", dynamic_ncols=True) as progress:

            def lane(take: _Take) -> Lane:
                keep = self._keep(take)

                def on_finish(output: RequestOutput) -> None:
                    keep(output)
                    progress.update()

                return Lane(self._llm(take), self.prompts, take.case.params, on_finish)

            lanes = {lane(take): take for take in takes}
            failed = side_by_side(list(lanes))
        for one, take in lanes.items():
            if one in failed:
                self.failed[take.case] = failed[one]
            else:
                take.add(one.round, one.outputs)

    def _keep(self, take: "_Take") -> Callable[[RequestOutput], None]:
        """In the first round, writes a generation to the files of --resume and --samples, if there are any."""
        if take.rounds or (self.kept is None and self.samples is None):
            return lambda output: None
        missing = set(take.missing)
        left = {token_ids: [i for i in rows if i in missing] for token_ids, rows in self._rows_of.items()}

        def keep(output: RequestOutput) -> None:
            # among rows with the same prompt, the first one left
            i = left[tuple(output.prompt_token_ids)].pop(0)
            if self.kept is not None:
                self.kept.append(self.hashes[take.case], output, self.settings.rows[i]["id"])
            if self.samples is not None:
                self.samples.add(take.case, self.settings.rows[i], self._asked[i], output)

        return keep

    def _write_found(self, take: "_Take") -> None:
        if self.samples is not None and take.resumed:
            for row, asked, output in zip(self.settings.rows, self._asked, take.outputs, strict=True):
                if output is not None:
                    self.samples.add(take.case, row, asked, output)

    def _llm(self, take: "_Take") -> LLM:
        return self.reference if take.case.mode == REFERENCE_IMPL else self.llm

    def _run(self, take: "_Take") -> Run:
        grades = None
        if not self.settings.is_dummy:
            pairs = zip(self.settings.rows, take.outputs, strict=True)
            grades = [grade(row, output.outputs[0].text) for row, output in pairs]
        if take.resumed:
            return Run(take.case, take.outputs, grades, [], None, None, take.resumed)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.settings.device == "cuda" else None
        steady, fault, rounds = steadiness(take.rounds)
        forwards, seconds = rounds[-1].forwards, [r.seconds for r in rounds]
        return Run(
            take.case, take.outputs, grades, seconds, forwards, peak, 0, rounds, steady, fault, take.first_seconds
        )

    def extra_info(self, run: Run) -> dict[str, Any]:
        return extra_info(run, self.settings, self.truncated, self.environment) | self.loading

    def resume_line(self) -> str:
        found = [output for outputs in self.found.values() for output in outputs]
        others = f"; {self.kept.num_left} there are of other settings" if self.kept.num_left else ""
        number = len(found) - found.count(None)
        damaged = f"; {self.kept.told_damaged()}" if self.kept.damaged else ""
        return f"blockinfer: {number} of {len(found)} generations found in {self.settings.resume}{others}{damaged}"

    def result(self, case: Case) -> Run:
        """The configuration's run; made now, without pytest-benchmark's timing, unless the throughput test has made it.

        Raises what making it raised, also if that was earlier: it is not tried again for every source.
        """
        if case in self.failed:
            raise self.failed[case]
        if case in self.runs:
            return self.runs[case]
        return self.measure(case, None)


@dataclasses.dataclass
class _Take:
    """A configuration while it is measured: the generations so far of its last round, and its rounds."""

    case: Case
    outputs: list[RequestOutput | None]
    rounds: list[Round] = dataclasses.field(default_factory=list)
    first_seconds: float | None = None

    def __post_init__(self) -> None:
        self.resumed = len(self.outputs) - self.outputs.count(None)

    @property
    def missing(self) -> list[int]:
        """The prompts of the next round: at first those without a generation, then all."""
        return [i for i, output in enumerate(self.outputs) if output is None or self.rounds]

    def add(self, one: Round, made: list[RequestOutput]) -> None:
        for i, output in zip(self.missing, made, strict=True):
            self.outputs[i] = output
        self.rounds.append(one)


def _room(llm: LLM) -> str:
    return f"{llm.config.model} takes {llm.config.max_model_len} tokens in all"
