"""A session's measurements: the model, the rows as prompts, and each configuration's run."""

import dataclasses
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from blockinfer import LLM, RequestOutput
from evals.configurations import REFERENCE_IMPL
from evals.graders import grade
from evals.record import Run, environment, extra_info, is_enough
from evals.reference_impl import ReferenceLLM
from evals.resume import Generations, fingerprint, settings_hash
from evals.rows import encode
from evals.settings import Case, Settings


class Suite:
    """The session's model and measurements: each configuration is run once, and graded from the same generations."""

    # what leaves pytest's capture, so that a terminal shows the progress
    uncaptured: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(self, llm: LLM, settings: Settings, kept: Generations | None = None) -> None:
        self.llm = llm
        self.reference = None
        if any(case.mode == REFERENCE_IMPL for case in settings.cases):
            self.reference = ReferenceLLM(llm)
        self.settings = settings
        self.environment = environment(settings, llm.config.dtype)
        self.runs: dict[Case, Run] = {}
        self.failed: dict[Case, Exception] = {}
        limit = llm.config.max_model_len - settings.max_tokens
        if limit < 1:
            raise ValueError(f"--max-tokens {settings.max_tokens} leaves no room for a prompt: {_room(llm)}")
        try:
            encoded = [encode(row, llm.tokenizer, limit) for row in settings.rows]
        except ValueError as error:
            raise ValueError(f"{error}: {_room(llm)}, --max-tokens asks for {settings.max_tokens} of it") from error
        self.prompts = [{"prompt_token_ids": token_ids} for token_ids, _ in encoded]
        self.truncated = sum(was_cut for _, was_cut in encoded)
        self.kept = kept
        self.found: dict[Case, list[RequestOutput | None]] = {}
        self.hashes: dict[Case, bytes] = {}
        if kept is not None:
            model = fingerprint(llm)
            # the reference's generations are not the engine's, though their params are those of vanilla
            names = {c: model + REFERENCE_IMPL * (c.mode == REFERENCE_IMPL) for c in settings.cases}
            self.hashes = {c: settings_hash(names[c], c.params) for c in settings.cases}
            self.found = {c: [kept.take(h, token_ids) for token_ids, _ in encoded] for c, h in self.hashes.items()}

    def close(self) -> None:
        """Gives the memory of the model back; what was measured stays."""
        self.llm.close()
        self.reference = None

    def measure(self, case: Case, benchmark: BenchmarkFixture | None) -> Run:
        """Runs a configuration, timed by `benchmark`: again and again until the mean is known or the time is over.

        Without a benchmark it is run once. Raises what the engine or a grader raises.
        """
        try:
            self.runs[case] = self._measure(case, benchmark)
        except Exception as error:
            self.failed[case] = error
            raise
        return self.runs[case]

    def _measure(self, case: Case, benchmark: BenchmarkFixture | None) -> Run:
        seconds: list[float] = []
        forwards: list[int] = []
        outputs = list(self.found.get(case, [None] * len(self.prompts)))
        resumed = len(outputs) - outputs.count(None)
        on_gpu = self.settings.device == "cuda"
        llm = self.reference if case.mode == REFERENCE_IMPL else self.llm

        def warm_up() -> None:
            if resumed:
                return
            outputs[:] = [None] * len(outputs)
            # one step a block: every shape but the schedule's length is the timed run's
            params = dataclasses.replace(case.params, denoising_steps=1)
            llm.generate(self.prompts[: self.settings.batch_size], params, use_tqdm=False)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()

        def generate() -> None:
            missing = [i for i, output in enumerate(outputs) if output is None]
            prompts = [self.prompts[i] for i in missing]
            keep = self.kept is not None and not seconds
            on_finish = partial(self.kept.append, self.hashes[case]) if keep else None
            before = llm.stats.forwards
            start = time.perf_counter()
            # ends with the token ids on the host, so the device is done
            made = llm.generate(prompts, case.params, use_tqdm=sys.stderr.isatty(), on_finish=on_finish)
            seconds.append(time.perf_counter() - start)
            forwards.append(llm.stats.forwards - before)
            for i, output in zip(missing, made, strict=True):
                outputs[i] = output

        with self.uncaptured():
            if self.kept is not None and not self.runs:
                print(f"\n{self.resume_line()}")
            if benchmark is None:
                warm_up()
                generate()
            else:
                benchmark.pedantic(generate, setup=warm_up, rounds=1)
                while not resumed and not is_enough(seconds, self.settings.max_seconds, self.settings.relative_error):
                    warm_up()
                    generate()
                    if benchmark.enabled:
                        benchmark.stats.update(seconds[-1])
        grades = None
        if not self.settings.is_dummy:
            pairs = zip(self.settings.rows, outputs, strict=True)
            grades = [grade(row, output.outputs[0].text) for row, output in pairs]
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        if resumed:
            return Run(case, outputs, grades, [], None, None, resumed)
        return Run(case, outputs, grades, seconds, forwards[-1], peak)

    def extra_info(self, run: Run) -> dict[str, Any]:
        return extra_info(run, self.settings, self.truncated, self.environment)

    def resume_line(self) -> str:
        found = [output for outputs in self.found.values() for output in outputs]
        others = f"; {self.kept.num_left} there are of other settings" if self.kept.num_left else ""
        number = len(found) - found.count(None)
        damaged = f"; {self.kept.told_damaged()}" if self.kept.damaged else ""
        return f"blockinfer: {number} of {len(found)} generations found in {self.settings.resume}{others}{damaged}"

    def result(self, case: Case) -> Run:
        """The configuration's run, made now, untimed by pytest-benchmark, where the throughput test has not made it.

        Raises what making it raised, then too: it is not tried again for every source.
        """
        if case in self.failed:
            raise self.failed[case]
        if case in self.runs:
            return self.runs[case]
        return self.measure(case, None)


def _room(llm: LLM) -> str:
    return f"{llm.config.model} takes {llm.config.max_model_len} tokens in all"
