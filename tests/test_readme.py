"""What the pages show runs as it is shown."""

import asyncio
import json
import re
import shlex
import shutil
from pathlib import Path

import httpx
import pytest
from pytest_benchmark import cli

import evals.__main__ as front
from blockinfer import SamplingParams
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from blockinfer.serve import __main__ as serve
from evals.gate import command as gate
from evals.gate import experiment
from evals.llada_tiny import quantized, sample, study, train
from evals.questions import build_sample
from evals.results import compare
from evals.timing import rounding, stages
from tests.serve.test_process import Process

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "blockinfer/README.md",
    "blockinfer/serve/README.md",
    "evals/README.md",
    "evals/timing/README.md",
    "evals/llada_tiny/README.md",
    "evals/lm_eval/README.md",
)
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
# what stands before the script's name is sbatch's, and lm-eval has options of its own
OURS = re.sub(r"sbatch .*?\.slurm", "", "".join(text for page, text in TEXT.items() if "lm_eval" not in page))
# to install, to serve and to ask
(SERVE,) = re.findall(r"<!-- serve -->\n```bash\n(.*?)```\n<!-- end -->", README, re.DOTALL)
SERVE = SERVE.strip().splitlines()

# Commands that no test runs, each with what it needs.
NEEDS = {
    "minutes": (
        "pytest evals/ --benchmark-json=out.json",
        "pytest evals/ --mode all --block-length 8,32 --num-samples 64",
        "pytest evals/ --unmasking threshold --threshold 0.8",
        "pytest evals/ --unmasking threshold,entropy_threshold --block-length 8 --block-add-threshold 0.5",
        "pytest evals/ --mode block --benchmark-autosave",
        "pytest evals/ --mode block --benchmark-compare --benchmark-compare-fail=median:50%",
        "pytest evals/ --num-samples 200 --mode block,block_refresh --unmasking low_confidence,threshold",
        "pytest evals/test_serving.py --benchmark-json=serving.json",
        "OMP_NUM_THREADS=1 pytest evals/ --dataset rows.jsonl --source mmlu --num-samples 200 --mode block "
        "--mmlu likelihood --skip-vanilla",
        "nox -s gate -- --base origin/main",
        "nox -s gate -- --base origin/main --profile quick",
        "python -m evals gate-experiment --runs 20 --slowdown 0,0.05,0.1,0.05:vanilla,0.05:threshold,0.05:memory "
        "--profile quick",
        "OMP_NUM_THREADS=1 pytest evals/ --benchmark-json=evals/baselines/amd-epyc-1-thread.json",
        "OMP_NUM_THREADS=1 pytest evals/ --benchmark-compare=evals/baselines/amd-epyc-1-thread.json "
        "--benchmark-compare-fail=median:5%",
    ),
    "a network": (
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[test]' && .venv/bin/pytest evals/ "
        "--benchmark-json=out.json",
        # .ci/run takes this one out of the page
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[test]' "
        "&& .venv/bin/pytest -n auto --maxprocesses=8 --dist=loadfile",
        "pytest evals/ --model GSAI-ML/LLaDA-8B-Instruct --dtype bfloat16",
        "python -m evals build-sample --out rows.jsonl --per-source 50 --seed 0",
        "pytest evals/ --dataset rows.jsonl",
        "pip install -c constraints.txt -e '.[lm-eval]'",
        "pip install -c constraints.txt -e '.[serve]'",
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[serve]'",
        "python -m evals lm-eval --model blockinfer --batch_size auto --tasks gsm8k,mmlu --apply_chat_template "
        "--model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,mode=block,threshold=.9,block_length=32",
    ),
    "a GPU": (
        "pytest evals/ --model llada-8b --load-format dummy",
        "pytest evals/test_steps.py --benchmark-json=steps.json",
        "pytest evals/test_kernels.py --benchmark-json=kernels.json",
        "python -m evals stages --mode block --batch 1 --prompt 128 --json block.json",
        "python -m evals stages --mode vanilla --batch 1 --prompt 128 --json vanilla.json",
        "python -m evals stages --mode block --batch 8 --prompt 3072 --json long.json",
        "python -m evals train-tiny --out evals/llada_tiny",
        "python -m evals study evals/llada_tiny --rows 250 --max-num-seqs 128 --out /tmp/study",
        "python -m evals study evals/llada_tiny --several-blocks --block-length 8,16,32 --max-num-seqs 128 "
        "--out /tmp/blocks",
        "python -m evals quantized-loss evals/llada_tiny --rows 250 --max-num-seqs 128",
        "python -m evals rounding --layers 1,2,4,8,16",  # or 16 GB, and minutes
    ),
    "two GPUs": ("pytest evals/test_steps.py --tensor-parallel-size 2",),
    "jq": ("jq -r 'select(.correct == false) | [.id, .mode, .extracted, (.gold | tostring)] | @tsv' samples.jsonl",),
    "a cluster": (
        "sbatch --ntasks=8 --gpus-per-task=1 evals/slurm/run_benchmark.slurm --model GSAI-ML/LLaDA-8B-Instruct",
    ),
    "what another test runs": (
        *SERVE[1:],  # test_the_server_s_commands
        "python -m blockinfer.serve MODEL",  # serve/test_process.py
        "python -m evals lm-eval --model blockinfer --model_args pretrained=evals/llada_tiny,mode=block,threshold=.9 "
        "--include_path evals/lm_eval/tasks --tasks blockinfer_gsm8k,blockinfer_mmlu --apply_chat_template "
        "--batch_size 8",  # lm_eval/test_lm_eval.py
        "python -m evals train-tiny --out /tmp/tiny --smoke",  # llada_tiny/test_training.py
        "pytest-benchmark --storage .benchmarks/DEVICE compare",  # test_history.py
        "python -m evals report out.json --samples elsewhere.jsonl",  # report/test_answers.py
        # own_questions/test_own_questions.py
        "pytest evals/ --dataset my_rows.jsonl --prompt my_prompt.jinja --mode block --benchmark-json=out.json",
        "python -m evals report out.json .benchmarks/*/*/*.json -o report.html",  # test_history.py has the pattern
    ),
}
# Commands that are run here, with the exit code.
RUN = {
    "python -m evals sample-tiny rows.jsonl --per-source 200 --seed 7": None,
    "python -m evals report out.json -o report.html": 0,
    "python -m evals report out.json": 0,
    "python -m evals compare old.json new.json": 0,
    "python -m evals compare evals/baselines/amd-epyc-1-thread.json out.json": 0,
}


def shown():
    for text in TEXT.values():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            lines = re.sub(r" \\\n +", " ", block).strip().splitlines()
            yield from (re.sub(r"\s+#.*", "", line) for line in lines)


def test_the_scripts(monkeypatch, capsys):
    """The second goes on from the first."""
    scripts, names = re.findall(r"```python\n(.*?)```", README, re.DOTALL), {}
    monkeypatch.chdir(ROOT)
    for script in scripts:
        exec(compile(script, "README.md", "exec"), names)
    assert names["score"].logprob < 0 == names["score"].standard_error
    assert len(names["choice"].probabilities) == 3 and names["filled"].outputs[0].infilled.text.startswith("2 + ")
    assert names["guided"].metrics.nfe == 2 * names["guided"].metrics.denoising_steps
    lines = capsys.readouterr().out.strip().splitlines()
    tokens, forwards = map(int, re.fullmatch(r"(\d+) tokens in (\d+) forwards", lines[-1]).groups())
    # right, and by several tokens a forward
    assert lines[-2].endswith("14 + 23 = 37 apples. The answer is 37.") and tokens > 2 * forwards > 0


def test_the_server_s_commands(capsys):
    """The last two as they are shown, but for the port."""
    serve, curl = map(shlex.split, SERVE[1:])
    assert serve[:3] == [".venv/bin/python", "-m", "blockinfer.serve"] and curl[:2] == ["curl", "-N"]
    url, header, body = curl[2], curl[curl.index("-H") + 1], curl[curl.index("-d") + 1]
    with Process(*serve[3:], cwd=ROOT) as server:
        url = url.replace("http://127.0.0.1:8000", server.url)
        with httpx.stream("POST", url, headers=dict([header.split(": ")]), content=body, timeout=30) as answer:
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        script_of_a_client(server.url, capsys)
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    texts = [delta["content"] for delta in deltas if delta.get("content")]
    assert len(texts) == 2 and "".join(texts).endswith("The answer is 37.")


def script_of_a_client(url, capsys):
    script = re.findall(r"```python\n(.*?)```", TEXT["blockinfer/serve/README.md"], re.DOTALL)[0]
    names = {}
    exec(compile(script.replace("http://127.0.0.1:8000", url), "blockinfer/serve/README.md", "exec"), names)
    assert names["chunk"].choices[0].finish_reason == "stop"
    assert capsys.readouterr().out.endswith("The answer is 37.")
    names["client"].close()


def test_the_server_s_scripts_without_http(monkeypatch, capsys):
    script = re.findall(r"```python\n(.*?)```", TEXT["blockinfer/serve/README.md"], re.DOTALL)[1]
    names = {}
    monkeypatch.chdir(ROOT)
    exec(compile(script, "blockinfer/serve/README.md", "exec"), names)
    assert names["output"].finished and names["output"].outputs[0].text.endswith("The answer is 37.")
    capsys.readouterr()
    asyncio.run(names["main"]())
    assert capsys.readouterr().out.endswith("The answer is 37.\n")
    names["llm"].close()


def test_every_command_is_run_or_says_what_it_needs():
    listed = [command for commands in NEEDS.values() for command in commands]
    assert len(listed) == len(set(listed)) and set(shown()) == {*listed, *RUN}


@pytest.mark.parametrize("command", RUN)
def test_a_command(command, tmp_path, monkeypatch):
    baseline = ROOT / "evals/baselines/amd-epyc-1-thread.json"
    (tmp_path / "evals/baselines").mkdir(parents=True)
    for name in ("out.json", "old.json", "new.json", f"evals/baselines/{baseline.name}"):
        shutil.copy(baseline, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "evals"]
    assert front.main(words[3:]) == RUN[command]


@pytest.mark.parametrize("name", ["my_rows.jsonl", "my_prompt.jinja", "my_graders.py"])
def test_the_example_of_own_questions_is_the_one_that_is_run(name):
    (shown_text,) = re.findall(rf"`{re.escape(name)}`\n\n```\w+\n(.*?)```", TEXT["evals/README.md"], re.DOTALL)
    assert shown_text == (ROOT / "tests/own_questions" / name).read_text(encoding="utf-8")


def test_every_mode_and_rule_is_described():
    rows = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert named >= {*MODES, *RULES}


def test_every_command_of_evals_is_one():
    named = set(re.findall(r"python -m evals ([a-z][a-z-]*)", "".join(TEXT.values())))
    assert named <= {*front.COMMANDS} and {"compare", "merge", "report", "gate", "study"} <= named


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", TEXT[page]):
        path, _, heading = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert target.startswith("http") or there.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("option", sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", OURS))))
def test_every_option_is_one(option, pytestconfig):
    known = {name for group in pytestconfig._parser._groups for o in group.options for name in o.names()}
    parsers = [build_sample.parser(), compare.make_parser(), experiment.make_parser(), gate.make_parser()]
    parsers += [
        serve.make_parser(),
        cli.make_parser(),
        stages.make_parser(),
        study.make_parser(),
        quantized.make_parser(),
        rounding.make_parser(),
        train.make_parser(),
        sample.make_parser(),
    ]
    known.update(*(parser._option_string_actions for parser in parsers))
    assert option in known


def test_every_option_of_a_request_stands_on_the_server_s_pages():
    named = set(re.findall(r"`(\w+)`", TEXT["blockinfer/serve/README.md"]))
    assert named >= {*SamplingParams.__dataclass_fields__}
    page = (ROOT / "blockinfer/serve/page.html").read_text(encoding="utf-8")
    assert set(re.findall(r"<option>(\w+)</option>", page)) == {*MODES, *RULES}
    (numbers,) = re.findall(r'\["block_length", .*?\]', page)
    sent = {*json.loads(numbers), "mode", "unmasking"}
    assert sent <= {*SamplingParams.__dataclass_fields__} and sent <= set(re.findall(r'id="(\w+)"', page))
    assert "block_add_threshold" in sent
