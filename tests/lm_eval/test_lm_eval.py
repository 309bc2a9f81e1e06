"""lm-eval as it is installed, on this engine, without a network: on local tasks, and method by method."""

import json
import math
from pathlib import Path

import pytest

from blockinfer import LLM, SamplingParams, ScoringParams
from evals.lm_eval.options import BadArguments, answer_params, read_model_arguments
from evals.questions.rows import encode_for_letter
from evals.runs.settings import read_settings
from evals.suite import Suite
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.families import checkpoints as families
from tests.options import Options

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from evals.lm_eval.adapter import BlockInferLM  # noqa: E402
from evals.lm_eval.command import main  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
# of other libraries, which lm-eval imports or leaves open
pytestmark = pytest.mark.filterwarnings("default")


def instances(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    # lm-eval would write its log past pytest
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("harness"))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    options = dict(dtype="float64", block_length=8, mc_num=6, max_gen_toks=24, ignore_eos=True, max_model_len=120)
    return BlockInferLM(pretrained=str(folder), batch_size=4, device="cpu", **options)


@pytest.fixture(scope="module")
def llm(model):
    return model.llm


# --- the command ---


def test_the_command_s_accuracy_is_the_suite_s(monkeypatch, tmp_path, capsys, caplog):
    """A task that generates and one of four choices, with chat template, cache and samples, through lm-eval's own
    command line; and once more, all of it from the cache."""
    monkeypatch.chdir(ROOT)
    model = "evals/llada_tiny"
    command = ["--model", "blockinfer", "--tasks", "blockinfer_gsm8k,blockinfer_mmlu", "--limit", "6"]
    command += ["--model_args", f"pretrained={model},mode=block,threshold=.9,device=cpu", "--batch_size", "6"]
    command += ["--include_path", "evals/lm_eval/tasks", "--apply_chat_template", "--log_samples"]
    command += ["--use_cache", str(tmp_path / "cache"), "--output_path", str(tmp_path / "out")]
    assert main(command) == 0
    # lm-eval prints its table through pytablewriter, whose old versions leave out what the columns are called
    assert "Metric" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = {task: value["acc,none"] for task, value in json.loads(results.read_text())["results"].items()}

    options = dict(model=model, device="cpu", num_samples=6, mode=["block"], unmasking=["threshold"])
    suites = {s: read_settings(Options(**options, source=[s])) for s in ("gsm8k", "mmlu")}
    with LLM(model, device="cpu", max_num_seqs=6) as llm:
        settings = suites["gsm8k"]
        generated = Suite(llm, settings).result(settings.cases[0])
        by_letter = letters_by_likelihood(Suite(llm, suites["mmlu"]))
    assert found == {
        "blockinfer_gsm8k": generated.accuracy,
        "blockinfer_mmlu": sum(by_letter) / 6,
    }
    (samples,) = (tmp_path / "out").rglob("samples_blockinfer_gsm8k_*.jsonl")
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert [line["resps"][0][0] for line in lines] == [o.outputs[0].text for o in generated.outputs]
    told = [record.getMessage() for record in caplog.records]
    assert any("6 answers, " in line and "tokens/s" in line and "tokens a forward" in line for line in told)
    assert any("24 continuations in " in line for line in told)

    caplog.clear()
    monkeypatch.setattr("blockinfer.engine.model_runner.ModelRunner.run", lambda *args: pytest.fail("it is cached"))
    assert main(command) == 0
    again = [path for path in (tmp_path / "out").rglob("results_*.json") if path != results]
    assert {task: value["acc,none"] for task, value in json.loads(again[0].read_text())["results"].items()} == found


def letters_by_likelihood(suite):
    """Each letter by itself."""
    encode = suite.llm.tokenizer.encode
    correct = []
    for row in suite.settings.rows:
        ids = encode_for_letter(row, suite.llm.tokenizer)
        letters = [encode(f" {letter}", add_special_tokens=False) for letter in "ABCD"]
        scores = [suite.llm.score([ids], [letter], use_tqdm=False)[0].logprob for letter in letters]
        correct.append("ABCD"[scores.index(max(scores))] == row["answer"])
    return correct


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=no/such/folder", "'no/such/folder' is no local folder"),
        ("mode=block", "--model_args needs pretrained=FOLDER"),
        ("pretrained=x,mode=dual", "--model_args: mode must be one of .*did you mean 'dual_cache'"),
        ("pretrained=x,gen_length=5", "^--model_args: the model got an unknown option 'gen_length'; it is called max"),
        ("pretrained=x,mc_num=0", "--model_args: mc_num must be at least 1, got 0"),
        ("pretrained=x,threshold=2", "--model_args: threshold must be between 0.0 and 1.0, got 2"),
        ("pretrained=x,model=y", "--model_args has pretrained and model, which are one option: leave one of them out"),
        ("pretrained=x,max_length=64,max_model_len=32", "has max_length and max_model_len, which are one option"),
        ("pretrained=x,max_tokens=8,max_gen_toks=9", "has max_tokens and max_gen_toks, which are one option"),
        ("pretrained=x,max_batch_size=8", "--max_batch_size is for models .* leave it out"),
    ],
)
def test_bad_arguments_are_one_sentence(monkeypatch, tmp_path, capsys, arguments, message):
    given = dict(part.split("=") for part in arguments.split(","))
    given = {name: int(value) if value.isdecimal() else value for name, value in given.items()}
    with pytest.raises(BadArguments, match=message):
        BlockInferLM(**given, device="cpu")


def test_the_command_tells_bad_arguments_without_a_traceback(monkeypatch, capsys):
    def fails():
        raise BadArguments("--batch_size must be a number")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fails)
    assert main([]) == 2
    assert capsys.readouterr().err == "blockinfer: --batch_size must be a number\n"


def test_the_command_tells_a_task_that_is_none_without_a_traceback(capsys):
    assert main(["--model", "blockinfer", "--model_args", "pretrained=x", "--tasks", "no_such_task"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lm-eval: Tasks not found: no_such_task; `python -m ev")


# --- options ---


@pytest.mark.parametrize(
    ("batch_size", "cfg_scale", "expected"),
    [(None, 0, 32), ("auto", 0, 32), ("auto:4", 0, 32), (5, 0, 5), ("5", 1.0, 10)],
)
def test_batch_size_is_requests_at_once(batch_size, cfg_scale, expected):
    arguments = read_model_arguments({"pretrained": "x", "cfg_scale": cfg_scale}, batch_size, None)
    assert arguments.llm["max_num_seqs"] == expected
    assert read_model_arguments({"pretrained": "x", "max_num_seqs": 7}, batch_size, "cpu").llm["max_num_seqs"] == 7


@pytest.mark.parametrize("batch_size", ["many", 0, -1, "1.5"])
def test_a_bad_batch_size(batch_size):
    with pytest.raises(BadArguments, match="--batch_size must be a number of answers at once, or auto, got"):
        read_model_arguments({"pretrained": "x"}, batch_size, None)


@pytest.mark.parametrize(
    "option, rule",
    [
        ("threshold", "threshold"),
        ("factor", "factor"),
        ("entropy_bound", "entropy"),
        ("entropy_threshold", "entropy_threshold"),
    ],
)
def test_a_rule_s_option_means_the_rule(option, rule):
    arguments = read_model_arguments({"pretrained": "x", option: 0.5}, None, None)
    params = answer_params(arguments, {"until": [], "max_gen_toks": 9}, {})
    assert (params.unmasking, params.rule_value, params.max_tokens) == (rule, 0.5, 9)


def test_what_a_task_says_goes_before_the_arguments():
    given = {"pretrained": "x", "temperature": 0.4, "block_length": 8, "stop_token_ids": [3]}
    arguments = read_model_arguments(given, None, None)
    kwargs = {"until": ["\n\n", "", "<|eot|>"], "max_gen_toks": 9, "temperature": 0.0, "do_sample": False, "top_p": 0.9}
    params = answer_params(arguments, kwargs | {"block_length": 4}, {"<|eot|>": 7})
    assert (params.temperature, params.block_length, params.stop) == (0.0, 4, ("\n\n",))
    assert params.stop_token_ids == (3, 7)
    for more, message in (({"temperature": 1.0}, "'top_p'; there is no such filter here"), ({"beams": 2}, "'beams'")):
        with pytest.raises(BadArguments, match=f"generation_kwargs.* got an unknown option {message}"):
            answer_params(arguments, kwargs | more, {})


# --- the methods ---


def test_generate_until(model, llm):
    """In the requests' order, each up to the first of what ends it, and no further than max_gen_toks."""
    contexts = ["hello", "a b c", "question"]
    params = SamplingParams(max_tokens=24, block_length=8, ignore_eos=True)
    free = [o.outputs[0].text for o in llm.generate(contexts, params, use_tqdm=False)]
    whole = model.generate_until(instances("generate_until", *((c, {"until": ["\n\n\n"]}) for c in contexts)), True)
    assert whole == free
    stops = [text[5:7] for text in free]
    asked = [(c, {"until": [stop, "no such"], "max_gen_toks": 20}) for c, stop in zip(contexts, stops, strict=True)]
    cut = model.generate_until(instances("generate_until", *asked), True)
    assert cut == [text[: text.index(stop)] for text, stop in zip(free, stops, strict=True)]


def test_repeats_of_a_sampled_answer_differ_and_a_run_repeats(folder):
    def texts():
        model = BlockInferLM(pretrained=str(folder), device="cpu", max_gen_toks=12, ignore_eos=True)
        kwargs = {"until": [], "do_sample": True, "temperature": 1.0}
        return model.generate_until(instances("generate_until", *[("hi", kwargs)] * 3), True)

    first = texts()
    assert len(set(first)) == 3 and texts() == first


def test_a_prompt_that_is_too_long_loses_its_beginning(model, llm, caplog):
    (text,) = model.generate_until(instances("generate_until", ("x" * 50 + "ab " * 60, {"until": []})), True)
    ids = model.tok_encode("x" * 50 + "ab " * 60)[-(120 - 24) :]
    params = SamplingParams(max_tokens=24, block_length=8, ignore_eos=True)
    assert text == llm.generate(ids, params, use_tqdm=False)[0].outputs[0].text
    assert "1 prompts lost their beginning" in caplog.text
    with pytest.raises(BadArguments, match="max_gen_toks=120 leaves no room for a prompt in 120 tokens"):
        model.generate_until(instances("generate_until", ("x", {"until": [], "max_gen_toks": 120})), True)


def test_a_block_causal_model_has_room_for_whole_blocks(tmp_path):
    """Of 30 tokens three blocks of 8."""
    folder = families.write_family(tmp_path, families.LLADA2, vocab_size=300)
    families.write_tokenizer(folder, {"<end>": 56, "<mask>": 57}, 270, eos_token="<end>", mask_token="<mask>")
    options = dict(max_gen_toks=10, block_length=8, max_model_len=30, ignore_eos=True, device="cpu")
    model = BlockInferLM(pretrained=str(folder), **options)
    (text,) = model.generate_until(instances("generate_until", ("ab " * 60, {"until": []})), True)
    params = SamplingParams(max_tokens=10, block_length=8, ignore_eos=True)
    ids = model.tok_encode("ab " * 60)[-(24 - 10) :]
    assert text == model.llm.generate(ids, params, use_tqdm=False)[0].outputs[0].text


def test_loglikelihood(model, llm):
    """Of one token and of several, with a space that moves from the context, and without a context."""
    pairs = [("ab", "c"), ("ab", "d"), ("ab ", "cd"), ("ab", " cd ef"), ("", "abc"), ("ab", "c")]
    before = llm.stats
    results = model.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    # c and d are read off one forward, of 4 tokens; " cd", " cd ef" and "abc" have six each
    assert llm.stats.rows - before.rows == 4 + 6 * (6 + 9 + 4)
    encode, params = llm.tokenizer.encode, ScoringParams(mc_num=6, seed=0)
    bos = llm.tokenizer.bos_token_id
    plain = [("ab", "c"), ("ab", "d"), ("ab", " cd"), ("ab", " cd ef"), ([bos], "abc"), ("ab", "c")]
    for (context, continuation), (logprob, is_greedy) in zip(plain, results, strict=True):
        ids = encode(continuation, add_special_tokens=False)
        (expected,) = llm.score([context] if isinstance(context, list) else context, [ids], params, use_tqdm=False)
        assert logprob == pytest.approx(expected.logprob, abs=1e-9) and is_greedy is False


def test_is_greedy(folder):
    model = BlockInferLM(pretrained=str(folder), device="cpu", dtype="float64", is_greedy=True, mc_num=2)
    params = SamplingParams(max_tokens=1, block_length=1, mode="vanilla", ignore_eos=True)
    (greedy,) = model.llm.generate("ab", params, use_tqdm=False)
    text = greedy.outputs[0].text
    other = "x" if text != "x" else "y"
    results = model.loglikelihood(instances("loglikelihood", ("ab", text), ("ab", other)), disable_tqdm=True)
    assert [is_greedy for _, is_greedy in results] == [True, False]


def test_loglikelihood_rolling(model, llm):
    """Every token once: 300 of them in windows of at most 119 behind the token before."""
    text = "abc de" * 50
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    short, long = model.loglikelihood_rolling(instances("loglikelihood_rolling", ("abcd",), (text,)), True)
    params, bos = ScoringParams(mc_num=6, seed=0), llm.tokenizer.bos_token_id
    assert short == pytest.approx(llm.score([[bos]], [ids[:3] + ids[4:5]], params, use_tqdm=False)[0].logprob, abs=1e-9)
    contexts = [[bos], ids[118:119]]
    windows = [ids[:119], ids[119:238]]
    total = sum(o.logprob for o in llm.score(contexts, windows, params, use_tqdm=False))
    # the last window sees as much as fits before it
    (last,) = llm.score([ids[180:238]], [ids[238:]], params, use_tqdm=False)
    assert long == pytest.approx(total + last.logprob, abs=1e-6) and math.isfinite(long)


def test_chat_templates(model, llm):
    history = [{"role": "user", "content": "hi"}]
    text = model.apply_chat_template(history)
    assert text == llm.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    begun = model.apply_chat_template([*history, {"role": "assistant", "content": "The"}], add_generation_prompt=False)
    assert begun == text + "The"
    assert model.chat_template(True) == llm.tokenizer.chat_template
    bos = llm.tokenizer.bos_token_id
    assert model.tok_encode(text).count(bos) == model.tok_encode("hi").count(bos) == 1
    assert model.tokenizer_name == llm.tokenizer.name_or_path.replace("/", "__")
