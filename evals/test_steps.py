"""What a whole denoising step costs: forward, confidence, unmasking, and the host's share.

A case sends requests of random token ids to `LLM.generate`, all at once, and no stop token ends one. ms a step is the
wall time over the forwards of the model, the prompt's among them. A short untimed run goes before; its time is stored
as first_seconds. A case is repeated until its mean is known to RELATIVE_ERROR or MAX_SECONDS are over. A timed run that
compiles or captures anything is reported, and does not count if others follow it (evals/runs/rounds.py).

If --model names none, the model on a GPU is LLaDA-8B's shape with random weights in bfloat16, and on a CPU the
repository's small one, at sizes that show only that all of this runs. One LLM with room for the largest case's requests
serves all cases, also those of a single request. Random weights have flat confidences: the rule `threshold` then
reveals one token a step, as the others do, and rounding changes a token more easily than with a trained model
(test_agreement).

With random weights, the masks of a block, which differ only by their positions, go to nearly the same experts of a
mixture: a trained model's rows use more of them, and a step of few rows reads more weights than here.

other_gb is the GPU's memory at the peak of a case besides weights and KV cache: intermediate tensors, and what CUDA
graphs keep, also those of earlier cases. Only the first case's is that of its requests alone.
"""

import dataclasses
from typing import NamedTuple

import pytest
import torch

from blockinfer import LLM
from blockinfer.config import DTYPES
from evals.conftest import close_suite, refuse_others, settings_of
from evals.results.record import loading
from evals.runs.configurations import variant
from evals.runs.rounds import is_enough, record, steadiness
from evals.runs.settings import Settings
from evals.timing.kernels import measure_ceilings
from evals.timing.steps import (
    Case,
    about,
    agreement,
    beside_uniform,
    environment_of,
    figures,
    least_ms,
    memory,
    ragged_lengths,
    random_prompts,
    refusal,
    timed_run,
    warmed_up,
)

# The memory that the weights of LLaDA-8B's shape and a KV cache of some requests need.
FREE_GB = 24
# A case's timed runs end when another would exceed these seconds; the longest cases end after their first run.
MAX_SECONDS = {"cuda": 15.0, "cpu": 0.0}
RELATIVE_ERROR = 0.005


class Sizes(NamedTuple):
    """Prompts and new tokens in tokens; `few` and `many` requests at once; the last three are the ragged requests'."""

    short: int
    long: int
    new: int
    block_length: int
    few: int
    many: int
    number: int
    prompt_range: tuple[int, int]
    new_range: tuple[int, int]

    @property
    def cases(self) -> dict[str, Case]:
        """Named by mode, requests and prompt, and by what is not the default: a rule, or several blocks open at once.

        Of the two cases with several open, one reveals one token a step; the other takes six steps a block, and the
        next block begins once .4 are revealed.
        """
        short, long, few, many = self.short, self.long, self.few, self.many
        cases = [self.case("block", 1, short), self.case("block", 1, long), self.case("block", 1, short, "threshold")]
        cases += [self.case("dual_cache", 1, short), self.case("vanilla", 1, short)]
        cases += [self.case("block", few, short), self.case("block", few, long), self.case("block", many, short)]
        several = {"block_add_threshold": 0.4, "decoded_token_threshold": 0.4, "denoising_steps": 6}
        cases += [self.case("block", 1, short)._replace(others=o) for o in ({"block_add_threshold": 0.01}, several)]
        return {self._name(case): case for case in cases}

    @staticmethod
    def _name(case: Case) -> str:
        rule = "" if case.unmasking == "low_confidence" else case.unmasking
        name = f"{case.mode}-{len(case.lengths)}x{case.lengths[0][0]}"
        return "-".join(filter(None, [name, rule, variant(case.params[0])]))

    def case(self, mode: str, number: int, prompt: int, unmasking: str = "low_confidence") -> Case:
        return Case(mode, [(prompt, self.new)] * number, self.block_length, unmasking)

    @property
    def ragged(self) -> Case:
        lengths = ragged_lengths(self.number, self.prompt_range, self.new_range)
        return Case("block", lengths, self.block_length)

    @property
    def uniform(self) -> Case:
        """Requests as long as the middle of both ranges, as many as run at once."""
        middle = sum(self.prompt_range) // 2, sum(self.new_range) // 2
        return Case("block", [middle] * self.many, self.block_length)


SIZES = {
    "cuda": Sizes(128, 3072, 256, 32, 8, 32, 200, (32, 2048), (64, 512)),
    "cpu": Sizes(16, 64, 16, 8, 2, 4, 8, (8, 64), (8, 24)),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        settings = settings_of(metafunc.config)
        cases = SIZES[settings.device].cases
        ranks = f"-tp{settings.tensor_parallel_size}" * (settings.tensor_parallel_size > 1)
        metafunc.parametrize("name", cases, ids=[name + ranks for name in cases])


def measured_model(settings: Settings, named: str | None) -> Settings:
    """The session's settings; if --model names none and there is a GPU, with LLaDA-8B's shape and random weights."""
    if named is not None or settings.device == "cpu":
        return settings
    dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    return dataclasses.replace(settings, model="llada-8b", load_format="dummy", tokenizer=None, dtype=dtype)


@pytest.fixture(scope="module")
def settings(request):
    return measured_model(settings_of(request.config), request.config.getoption("--model"))


@pytest.fixture(scope="module")
def sizes(settings):
    return SIZES[settings.device]


@pytest.fixture(scope="module")
def ceilings(request, settings):
    """The device's ceilings, measured before the LLM takes its memory; for the dtype `auto` in the device's usual
    one."""
    # the suite's tests have finished: see pytest_collection_modifyitems
    close_suite(request.config)
    usual = {"cuda": torch.bfloat16, "cpu": torch.float32}[settings.device]
    return measure_ceilings(DTYPES.get(settings.dtype, usual), settings.device)


@pytest.fixture(scope="module")
def llm(settings, sizes, ceilings):
    if settings.device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 1e9
        if settings.model == "llada-8b" and free < FREE_GB:
            pytest.skip(
                f"LLaDA-8B's shape needs {FREE_GB} GB of GPU memory, {free:.1f} are free; --model names another"
            )
    try:
        llm = LLM(settings.model, tokenizer=settings.tokenizer, max_num_seqs=sizes.many, **settings.engine_options)
    except (ValueError, OSError) as error:
        # every test would fail alike
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    with llm:
        yield llm


@pytest.fixture(scope="module")
def environment(settings, llm):
    return environment_of(settings, llm)


@pytest.fixture
def measure(benchmark, llm, environment, settings, ceilings):
    """measure(name, case): times it; its figures go to extra_info. -> the last run's outputs."""

    def measure(name, case):
        benchmark.extra_info.update(about(name, case, llm, environment))
        prompts, params = random_prompts(llm, case.lengths), case.params
        first_seconds, runs, outputs = [], [], []

        def rounds():
            first_seconds.append(warmed_up(llm, prompts, params))
            if settings.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            limits = MAX_SECONDS[settings.device], RELATIVE_ERROR
            while not runs or not is_enough([run.round for run in runs], *limits, least=2):
                run, outputs[:] = timed_run(llm, prompts, params)
                runs.append(run)
            return [r.seconds for r in steadiness([run.round for run in runs]).rounds]

        record(benchmark, rounds)
        info = figures(*first_seconds, runs) | memory(llm) | loading(llm)
        made = llm.config.dtype.itemsize, ceilings, llm.config.quantization, settings.tensor_parallel_size
        info |= least_ms(runs[-1], llm.model_config, *made)
        benchmark.extra_info.update(info)
        return outputs

    return measure


@pytest.fixture
def check(request, llm, environment):
    """check(name, case) -> the case. Skips the test if the model does not decode like that, or takes no requests so
    long."""

    def check(name, case):
        if reason := refusal(llm, case):
            pytest.skip(reason)
        longest = max(map(sum, case.lengths))
        if longest > llm.config.max_model_len:
            pytest.skip(f"{llm.config.model} takes {llm.config.max_model_len} tokens in all, this case has {longest}")
        refuse_others(request, about(name, case, llm, environment))
        return case

    return check


# A fixture each: they come before `benchmark`, which a test that has it must use.
@pytest.fixture
def requests(check, sizes, name):
    return check(name, sizes.cases[name])


@pytest.fixture
def ragged_requests(check, sizes):
    return check("ragged", sizes.ragged)


@pytest.fixture
def short_requests(check, sizes):
    return check("agreement", sizes.case("block", sizes.many, sizes.short))


@pytest.mark.benchmark(group="steps")
def test_step(requests, measure, name):
    measure(name, requests)


@pytest.mark.benchmark(group="steps: ragged")
def test_ragged(ragged_requests, measure, benchmark, llm, sizes):
    """Requests of many lengths, more than run at once: tokens/s beside those of `uniform`, with prefill and tail in
    both."""
    prompts, params = random_prompts(llm, sizes.uniform.lengths), sizes.uniform.params
    warmed_up(llm, prompts, params)
    uniform, _ = timed_run(llm, prompts, params)
    measure("ragged", ragged_requests)
    benchmark.extra_info.update(beside_uniform(benchmark.extra_info, sizes.uniform, uniform))


@pytest.mark.benchmark(group="steps: agreement")
def test_agreement(short_requests, measure, benchmark, llm, sizes):
    """Whether requests at once get the same tokens as alone, `few` of them: in low precision rounding can change
    some."""
    sent_alone = list(zip(random_prompts(llm, short_requests.lengths), short_requests.params, strict=True))[: sizes.few]
    alone = [timed_run(llm, [prompt], [one])[1][0] for prompt, one in sent_alone]
    benchmark.extra_info.update(agreement(alone, measure("agreement", short_requests)))
