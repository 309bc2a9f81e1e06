"""What a run of the suite measures: the command line's options, checked and resolved, and the cases they make."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from blockinfer import SamplingParams
from blockinfer.checks import nearest
from blockinfer.config import DTYPES
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from evals.files.outputs import check_outputs, samples_path
from evals.questions.graders import GRADER_VERSIONS, versions
from evals.questions.prompts import PROMPTS_VERSION, messages
from evals.questions.rows import Ask, Row, load_rows, rows_hash, shard_positions
from evals.questions.template import PromptTemplate
from evals.runs.configurations import REFERENCE_IMPL, STANDARD, total_steps, variant
from evals.runs.extras import check_extras, extra_options, flag
from evals.runs.machine import device_name

SUITE_MODES = (STANDARD, *MODES)

_EVALS = Path(__file__).resolve().parent.parent
TINY_MODEL = _EVALS / "llada_tiny"
SAMPLE = _EVALS.parent / "sample_200.jsonl"
PUBLISHED_MODEL = "GSAI-ML/LLaDA-8B-Instruct"


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration: its parts of the test's id, and the options of all its requests."""

    mode: str
    block_length: int
    unmasking: str
    params: SamplingParams

    @property
    def name(self) -> str:
        """The id, always with the rule."""
        return "-".join(filter(None, [self.mode, str(self.block_length), self.unmasking, variant(self.params)]))


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of the chosen rows that a session evaluates: shard `index` of `of`, from 1, with the rows at
    `positions`.

    rows is a hash of all chosen rows: shards of one run have the same.
    """

    index: int
    of: int
    positions: list[int]
    rows: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of one session, with every default filled in.

    device is "cpu" or "cuda"; tensor_parallel_size: ranks that share the model; batch_size in requests; max_seconds of
    repeated timing of a case; relative_error of the mean at which timing may end earlier; max_accuracy_loss a share,
    not points. prompt is the template of --prompt; grader_versions are of the graders of all shards' rows.
    """

    model: str
    load_format: str
    tokenizer: str | None
    dtype: str
    quantization: str | None
    device: str
    tensor_parallel_size: int
    batch_size: int
    dataset: str
    rows: list[Row] = dataclasses.field(repr=False)
    cases: list[Case] = dataclasses.field(repr=False)
    max_tokens: int
    max_seconds: float
    relative_error: float
    max_accuracy_loss: float
    output: str
    samples: str | None
    resume: str | None
    shard: Shard | None
    prompt: PromptTemplate | None
    grader_versions: dict[str, int | str]

    @property
    def ask(self) -> Ask:
        """The function that makes a row's conversation."""
        return self.prompt.messages if self.prompt else messages

    @property
    def prompts_version(self) -> int | str:
        return self.prompt.version if self.prompt else PROMPTS_VERSION

    @property
    def engine_options(self) -> dict[str, str | int | None]:
        """The options of LLM that say how the model is loaded."""
        names = ("dtype", "quantization", "device", "load_format", "tensor_parallel_size")
        return {name: getattr(self, name) for name in names}

    @property
    def device_name(self) -> str:
        return device_name(self.device, self.tensor_parallel_size)

    @property
    def is_dummy(self) -> bool:
        return self.load_format == "dummy"

    @property
    def is_tiny(self) -> bool:
        """Whether the small model is measured; with random weights only its shape is."""
        return Path(self.model).resolve() == TINY_MODEL.resolve()

    @property
    def several_rules(self) -> bool:
        return {case.unmasking for case in self.cases} != {"low_confidence"}


def read_settings(config: pytest.Config) -> Settings:
    """Raises pytest.UsageError for an option that names nothing known and for rows that cannot be read."""
    option = config.getoption
    device = option("--device")
    if device not in ("auto", "cpu", "cuda"):
        raise pytest.UsageError(f"--device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device cuda was asked for, but this torch ({torch.__version__}) sees no GPU")
    if option("--dtype") not in ("auto", *DTYPES):
        raise pytest.UsageError(f"--dtype must be one of auto, {', '.join(DTYPES)}, got {option('--dtype')!r}")
    if option("--reference-impl") != option("--trust-remote-code"):
        raise pytest.UsageError(
            "--reference-impl runs the code that the checkpoint brings: read it, then pass --trust-remote-code with it"
            if option("--reference-impl")
            else "--trust-remote-code is read by --reference-impl alone: nothing else runs a checkpoint's code"
        )
    if option("--reference-impl") and option("--load-format") == "dummy":
        raise pytest.UsageError("--reference-impl needs a checkpoint, and --load-format dummy has none")
    if option("--reference-impl") and option("--tensor-parallel-size") > 1:
        raise pytest.UsageError("--reference-impl runs on one GPU: leave out --tensor-parallel-size")
    if option("--tensor-parallel-size") > 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        raise pytest.UsageError("--tensor-parallel-size starts its ranks itself: run pytest without torchrun")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    model = option("--model") or (PUBLISHED_MODEL if on_gpu else str(TINY_MODEL))
    dummy = option("--load-format") == "dummy"
    dataset = option("--dataset") or str(SAMPLE)
    tokenizer = option("--tokenizer") or (str(TINY_MODEL) if dummy else None)
    compared = option("--benchmark-compare")
    inputs = [
        dataset,
        model,
        *filter(None, [tokenizer, option("--prompt")]),
        *([compared] if isinstance(compared, str) else []),
    ]
    check_outputs(option, inputs)
    number = option("--num-samples") or (None if on_gpu else 32)
    try:
        rows = load_rows(dataset, option("--source"), option("--skip-sample"), number)
        # with random weights nothing is judged, so no function is imported
        grader_versions = GRADER_VERSIONS if dummy else versions(rows)
        prompt = PromptTemplate(option("--prompt")) if option("--prompt") else None
        # before the model is loaded, which may take minutes
        for row in rows if prompt else ():
            prompt.messages(row)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    shard = _shard(option("--shard"), rows)
    return Settings(
        model=model,
        load_format=option("--load-format"),
        tokenizer=tokenizer,
        dtype=option("--dtype"),
        quantization=option("--quantization"),
        device="cuda" if on_gpu else "cpu",
        tensor_parallel_size=option("--tensor-parallel-size"),
        batch_size=option("--batch-size") or (32 if on_gpu else 8),
        dataset=dataset,
        rows=[rows[i] for i in shard.positions] if shard else rows,
        cases=_cases(config, dummy),
        max_tokens=option("--max-tokens"),
        max_seconds=(60.0 if on_gpu else 0.0) if option("--max-seconds") is None else option("--max-seconds"),
        relative_error=option("--relative-error"),
        max_accuracy_loss=option("--max-accuracy-loss") / 100,
        output=option("--output"),
        samples=samples_path(option),
        resume=option("--resume"),
        shard=shard,
        prompt=prompt,
        grader_versions=grader_versions,
    )


def _shard(given: tuple[int, int] | None, rows: list[Row]) -> Shard | None:
    if given is None:
        return None
    index, of = given
    if of > len(rows):
        raise pytest.UsageError(f"--shard {index}/{of}: there are more shards than rows, of which {len(rows)} are left")
    return Shard(index, of, shard_positions(rows, index, of), rows_hash(rows))


def _cases(config: pytest.Config, ignore_eos: bool) -> list[Case]:
    option = config.getoption
    modes = _names("--mode", option("--mode") or ["all"], SUITE_MODES)
    rules = _names("--unmasking", option("--unmasking") or ["low_confidence"], tuple(RULES))
    if option("--skip-vanilla"):
        modes = [mode for mode in modes if mode not in (STANDARD, "vanilla")]
        if not modes:
            raise pytest.UsageError("--skip-vanilla leaves no mode: --mode names only vanilla ones")
    for name in dict.fromkeys(spec.option for spec in RULES.values() if spec.option):
        readers, given = [rule for rule, spec in RULES.items() if spec.option == name], flag(name)
        if option(given) is not None and not {*readers} & {*rules}:
            raise pytest.UsageError(
                f"{given} is read by --unmasking {' and '.join(readers)} alone, got {', '.join(rules)}"
            )
    check_extras(option, modes, rules)
    cases = []
    for mode in modes + [REFERENCE_IMPL] * option("--reference-impl"):
        for block_length in option("--block-length"):
            for rule in rules:
                try:
                    params = _params(config, mode, block_length, rule, ignore_eos)
                except ValueError as error:
                    raise pytest.UsageError(str(error)) from error
                # standard decoding may be the same at several block lengths: it is measured once
                if mode != STANDARD or all(c.mode != STANDARD or c.params != params for c in cases):
                    cases.append(Case(mode, block_length, rule, params))
    return cases


def _params(config: pytest.Config, mode: str, block_length: int, rule: str, ignore_eos: bool) -> SamplingParams:
    """A rule gets only the options that it reads; a rule without a schedule gets the step limit only if asked for."""
    steps, option = config.getoption("--denoising-steps"), RULES[rule].option
    if steps is None and RULES[rule].has_schedule:
        steps = 32
    block_wise = SamplingParams(
        max_tokens=config.getoption("--max-tokens"),
        block_length=block_length,
        denoising_steps=steps,
        mode="vanilla" if mode in (STANDARD, REFERENCE_IMPL) else mode,
        unmasking=rule,
        ignore_eos=ignore_eos,
        **({option: config.getoption(flag(option))} if option else {}),
        **extra_options(config.getoption, mode, rule),
    )
    if mode != STANDARD:
        return block_wise
    # one block, with as many steps in all as the block-wise run
    return dataclasses.replace(block_wise, block_length=block_wise.max_tokens, denoising_steps=total_steps(block_wise))


def _names(option: str, given: list[str], known: tuple[str, ...]) -> list[str]:
    if given == ["all"]:
        return list(known)
    if "all" in given:
        raise pytest.UsageError(f"{option}: 'all' stands alone, got {', '.join(given)}")
    for name in given:
        if name not in known:
            hint = nearest(name, known)
            raise pytest.UsageError(f"{option} must be 'all' or names of {', '.join(known)}; got {name!r}{hint}")
    return given
