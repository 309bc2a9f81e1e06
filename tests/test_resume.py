"""--resume: what is kept, what is found again, and a suite that was stopped in the middle."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blockinfer
from blockinfer import LLM, SamplingParams
from evals import resume
from evals.record import table
from evals.resume import Generations, fingerprint, settings_hash
from tests.checkpoints import write_checkpoint

SETTINGS = settings_hash("model", SamplingParams())


@pytest.fixture(scope="module")
def outputs(shared_llm):
    return shared_llm.generate([[1, 2, 3], [4, 5], [1, 2, 3]], SamplingParams(max_tokens=8), use_tqdm=False)


def write_lines(path, outputs):
    with Generations(path) as kept:
        for output in outputs:
            kept.append(SETTINGS, output)
    return path.read_bytes()


def test_what_was_appended_is_found_once_each(tmp_path, outputs):
    path = tmp_path / "kept.jsonl"
    with Generations(path) as first:
        assert first.take(SETTINGS, [1, 2, 3]) is None
        for output in outputs:
            first.append(SETTINGS, output)
    with Generations(path) as again:
        assert again.num_left == 3
        for output in outputs:
            assert again.take(SETTINGS, output.prompt_token_ids) == dataclasses.replace(output, request_id=-1)
        assert again.take(SETTINGS, [1, 2, 3]) is again.take(SETTINGS, [9]) is None and again.num_left == 0


def test_other_params_and_another_model_find_nothing(tmp_path, outputs):
    write_lines(tmp_path / "kept.jsonl", outputs[:1])
    with Generations(tmp_path / "kept.jsonl") as kept:
        for changed in (SamplingParams(max_tokens=127), SamplingParams(mode="vanilla"), SamplingParams(seed=1)):
            assert kept.take(settings_hash("model", changed), [1, 2, 3]) is None
        assert kept.take(settings_hash("other", SamplingParams()), [1, 2, 3]) is None
        assert kept.take(SETTINGS, [1, 2]) is None and kept.take(SETTINGS, [1, 2, 3]) is not None


def test_a_last_line_cut_anywhere_is_taken_out_and_written_anew(tmp_path, outputs):
    path = tmp_path / "kept.jsonl"
    whole = write_lines(path, outputs[:2])
    one = whole.index(b"\n") + 1
    for length in range(one, len(whole)):
        path.write_bytes(whole[:length])
        with Generations(path) as kept:
            assert kept.num_left == 1 and path.read_bytes() == whole[:one]
            kept.append(SETTINGS, outputs[1])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"notes", b'{"a": 1}\n', b"\x00\x00", b"[]\n", b'{"key": "a", "completion": {}}\n']
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "kept.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="kept.jsonl: line 1 is no generation that the suite wrote"):
        Generations(path)
    assert path.read_bytes() == content


def test_a_damaged_line_in_the_middle_is_named(tmp_path, outputs):
    path = tmp_path / "kept.jsonl"
    line = write_lines(path, outputs[:1])
    damaged = line + b'{"key": "cut\n' + line + b'{"key": "cut'
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="line 2 is no generation"):
        Generations(path)
    assert path.read_bytes() == damaged


def test_two_runs_cannot_write_to_one_file(tmp_path):
    path = tmp_path / "kept.jsonl"
    with Generations(path), pytest.raises(ValueError, match="kept.jsonl: another run is writing to it; wait"):
        Generations(path)
    with Generations(path):
        pass


def test_the_fingerprint_is_of_weights_config_dtype_and_code(tmp_path, checkpoint, monkeypatch):
    def of(folder=checkpoint, **options):
        with LLM(folder, **({"device": "cpu"} | options)) as llm:
            return fingerprint(llm)

    base = of()
    assert base == of() == of(max_num_seqs=2)
    seen = {base, of(dtype="bfloat16"), of(mask_token_id=1)}
    seen.add(of(write_checkpoint(tmp_path / "weights", vocab_size=300, seed=1), tokenizer=checkpoint))
    copy = shutil.copytree(checkpoint, tmp_path / "theta")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"rope_theta": ', '"rope_theta": 1'))
    seen.add(of(copy))
    code = shutil.copytree(Path(blockinfer.__file__).parent, tmp_path / "code")
    monkeypatch.setattr(resume, "blockinfer", SimpleNamespace(__file__=str(code / "__init__.py")))
    assert of() == base
    with open(code / "decoding" / "modes.py", "a") as file:
        file.write("\n")
    seen.add(of())
    assert len(seen) == 6


class Timer:
    """pytest-benchmark's fixture as --benchmark-disable leaves it."""

    enabled = False

    def pedantic(self, function, rounds):
        function()


three_rounds = Timer()


def generations(run):
    return [output.outputs[0].token_ids for output in run.outputs]


def test_a_suite_stopped_in_the_middle_goes_on(make_suite, tmp_path, chat_llm, monkeypatch):
    path = tmp_path / "kept.jsonl"
    whole = make_suite()
    vanilla, block = whole.settings.cases
    expected = {case: whole.measure(case, three_rounds) for case in (vanilla, block)}

    suite = make_suite(resume=str(path))
    assert suite.resume_line() == f"blockinfer: 0 of 14 generations found in {path}"
    run = suite.measure(vanilla, three_rounds)
    assert run.resumed == 0 and len(run.seconds) == 3 and len(path.read_bytes().splitlines()) == 7
    append, number = Generations.append, 0

    def stops(self, settings, output):
        nonlocal number
        number += 1
        if number == 2:
            raise KeyboardInterrupt
        append(self, settings, output)

    monkeypatch.setattr(Generations, "append", stops)
    with pytest.raises(KeyboardInterrupt):
        suite.measure(block, three_rounds)
    monkeypatch.undo()

    again = make_suite(resume=str(path))
    assert again.resume_line() == f"blockinfer: 8 of 14 generations found in {path}"
    before = chat_llm.stats.forwards
    assert generations(again.measure(vanilla, three_rounds)) == generations(expected[vanilla])
    assert chat_llm.stats.forwards == before, "nothing was left to generate"
    run = again.measure(block, three_rounds)
    assert run.resumed == 1 and generations(run) == generations(expected[block])
    assert len(path.read_bytes().splitlines()) == 14
    assert run.grades == expected[block].grades

    info, before = again.extra_info(run), whole.extra_info(expected[block])
    speed = ["tokens_per_second", "forwards", "ms_per_forward", "seconds", "latency_p50", "latency_p95"]
    assert all(info[key] is None and before[key] > 0 for key in speed)
    same = ["n", "tokens", "nfe", "steps", "accuracy", "accuracy_by_source", "mean_prompt_tokens", "stopped"]
    assert {key: info[key] for key in same} == {key: before[key] for key in same}
    assert info["resumed"] == 1 and before["resumed"] == 0
    assert [line.split()[3] for line in table(list(again.runs.values()))[1:]] == ["resumed", "resumed"]


def test_other_settings_are_not_mixed_up(make_suite, tmp_path):
    path = tmp_path / "kept.jsonl"
    suite = make_suite(resume=str(path), mode=["block"])
    suite.measure(suite.settings.cases[0], three_rounds)
    other = make_suite(resume=str(path), mode=["block"], max_tokens=11)
    assert other.resume_line() == f"blockinfer: 0 of 7 generations found in {path}; 7 there are of other settings"
    run = other.measure(other.settings.cases[0], three_rounds)
    assert run.resumed == 0 and run.tokens_per_second > 0
    batch = make_suite(resume=str(path), mode=["block"], batch_size=2)
    assert "7 of 7 generations found" in batch.resume_line()


def test_bfloat16_weights_have_a_fingerprint(checkpoint):
    with LLM(checkpoint, device="cpu", dtype=torch.bfloat16) as llm:
        assert len(fingerprint(llm)) == 64
