"""--resume: what is kept, what is found again, and a suite that was stopped in the middle."""

import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import blockinfer
from blockinfer import LLM, SamplingParams
from evals.results.table import table
from evals.runs import resume
from evals.runs.resume import Generations, fingerprint, settings_hash
from tests.checkpoints import write_checkpoint

SETTINGS = settings_hash("model", SamplingParams())


@pytest.fixture(scope="module")
def outputs(shared_llm):
    return shared_llm.generate([[1, 2, 3], [4, 5], [1, 2, 3]], SamplingParams(max_tokens=8), use_tqdm=False)


def write_lines(path, outputs):
    with Generations(path) as kept:
        for output in outputs:
            kept.append(SETTINGS, output, "a")
    return path.read_bytes()


def test_what_was_appended_is_found_once_each(tmp_path, outputs):
    path = tmp_path / "kept.jsonl"
    with Generations(path) as first:
        assert first.take(SETTINGS, [1, 2, 3]) is None
        for output in outputs:
            first.append(SETTINGS, output, "a")
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
    # a power cut leaves NULs where data was to come
    for length, fill in [
        *((length, b"") for length in range(one, len(whole) - 1)),
        (one + 9, b"\0" * 99),
        (one, b"\0"),
    ]:
        path.write_bytes(whole[:length] + fill)
        with Generations(path) as kept:
            assert kept.num_left == 1 and not kept.damaged and path.read_bytes() == whole[:one]
            kept.append(SETTINGS, outputs[1], "a")
        assert path.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n", b"\r\n", b"\0\0", b"\n\0\0\0", b"\n \n\t\n"])
def test_what_is_only_the_end_of_a_whole_line_costs_nothing(tmp_path, outputs, ending):
    path = tmp_path / "kept.jsonl"
    whole = write_lines(path, outputs[:2])
    path.write_bytes(whole.removesuffix(b"\n") + ending)
    with Generations(path) as kept:
        assert kept.num_left == 2 and not kept.damaged
        kept.append(SETTINGS, outputs[2], "a")
    with Generations(path) as kept:
        assert kept.num_left == 3 and not kept.damaged
    path.write_bytes(whole.replace(b"\n", b"\n\0\0\0", 1))
    with Generations(path) as kept:
        assert kept.num_left == 2 and not kept.damaged


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"\n", b'{"key": "cut'])
def test_a_file_that_no_whole_line_came_to_is_begun_anew(tmp_path, outputs, content):
    path = tmp_path / "kept.jsonl"
    path.write_bytes(content)
    with Generations(path) as kept:
        assert kept.num_left == 0 and not kept.damaged
        kept.append(SETTINGS, outputs[0], "a")
    with Generations(path) as kept:
        assert kept.num_left == 1 and not kept.damaged


@pytest.mark.parametrize("content", [b"notes", b'{"a": 1}\n', b"[]\n", b"\xff\n", b"[" * 100_000])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "kept.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="kept.jsonl: line 1 is no generation that the suite wrote"):
        Generations(path)
    assert path.read_bytes() == content and [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]


DAMAGES = {
    "text": (["completion"], {"text": None}),
    "token_ids": (["completion"], {"token_ids": "abc"}),
    "other token_ids": (["completion"], {"token_ids": [1, 2]}),
    "finish_reason": (["completion"], {"finish_reason": 5}),
    "nfe": (["metrics"], {"nfe": float("inf")}),
    "negative nfe": (["metrics"], {"nfe": -5}),
    "huge nfe": (["metrics"], {"nfe": 10**400}),
    "null nfe": (["metrics"], {"nfe": None}),
    "seconds": (["metrics"], {"total_seconds": float("nan")}),
    "a field more": (["metrics"], {"more": 1}),
    "key": ([], {"key": "x"}),
    "no metrics": ([], {"metrics": None}),
    "a field more on top": ([], {"more": 1}),
    "hash": ([], {"sha256": None}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named_and_set_aside_and_generated_again(tmp_path, outputs, damage):
    path = tmp_path / "kept.jsonl"
    first, second, third = write_lines(path, outputs).splitlines(keepends=True)
    fields = json.loads(second)
    inner, (way, change) = fields, DAMAGES[damage]
    for key in way:
        inner = inner[key]
    inner |= change
    damaged = json.dumps(fields).encode() + b"\n"
    path.chmod(0o640)
    path.write_bytes(first + damaged + third + b'{"key": "cut')
    with Generations(path) as kept:
        said = f"line 2 was damaged: moved to {path}.damaged, to be generated again"
        assert kept.damaged == [2] and kept.told_damaged() == said
        assert path.read_bytes() == first + third and (tmp_path / "kept.jsonl.damaged").read_bytes() == damaged
        assert kept.take(SETTINGS, [1, 2, 3]) and kept.take(SETTINGS, [1, 2, 3]) and kept.take(SETTINGS, [4, 5]) is None
        kept.append(SETTINGS, outputs[1], "a")
        # of the file that stands there now
        with pytest.raises(ValueError, match="another run is writing to it"):
            Generations(path)
    assert path.read_bytes() == first + third + second and path.stat().st_mode & 0o777 == 0o640
    with Generations(path) as kept:
        assert not kept.damaged and kept.num_left == 3


def test_many_damaged_lines_are_counted(tmp_path, outputs):
    path = tmp_path / "kept.jsonl"
    line = write_lines(path, outputs[:1])
    path.write_bytes(b"notes\n" * 11 + line)
    with Generations(path) as kept:
        assert kept.num_left == 1 and kept.told_damaged().startswith(
            "11 lines (1, 2, 3, 4, 5, 6, 7, 8, 9, ...) were dam"
        )
    path.write_bytes(b'{"key": "cut\n' + path.read_bytes())
    with Generations(path) as kept:
        assert kept.damaged == [1]
    assert (tmp_path / "kept.jsonl.damaged").read_bytes() == b"notes\n" * 11 + b'{"key": "cut\n'


@given(
    st.floats(allow_nan=False, allow_infinity=False), st.text(st.characters(exclude_categories=["Cs"])), st.integers()
)
def test_what_is_kept_is_read_as_it_was(number, text, integer):
    line = {"key": text, "completion": {"text": text, "token_ids": [integer]}, "metrics": {"total_seconds": number}}
    assert resume._parsed(json.dumps(line | {"sha256": resume._hash(line)}).encode()) == line


def test_a_line_that_cannot_be_written_costs_no_more_than_itself(tmp_path, outputs, capsys):
    path = tmp_path / "kept.jsonl"
    with Generations(path) as kept:
        kept.append(SETTINGS, outputs[0], "a")
        one, file = path.read_bytes(), kept._file

        class Full:
            """Half a line fits."""

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data):
                if os.fstat(file.fileno()).st_size > len(one):
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data[:50])

        kept._file = Full()
        kept.append(SETTINGS, outputs[1], "a")
        assert path.read_bytes() == one
        kept.append(SETTINGS, outputs[1], "a")
        kept._file = file
        kept.append(SETTINGS, outputs[2], "a")
        said = f"--resume {path}: 2 generations could not be kept: No space left on device. The same command would"
        assert kept.lost == 2 and kept.told_lost().startswith(said)
    assert capsys.readouterr().err.count("No space left on device") == 1
    with Generations(path) as kept:
        assert kept.num_left == 2 and not kept.damaged


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/dev/null", "it is a device"),
        ("", "it is a folder"),
        ("no/kept.jsonl", "there is no folder"),
        ("n" * 256, "File name too long"),
    ],
)
def test_what_cannot_keep_anything_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=f"--resume: '.*' cannot be written: {message}"):
        Generations(tmp_path / name)


def test_a_link_to_the_file_stays_one(tmp_path, outputs):
    path, link = tmp_path / "kept.jsonl", tmp_path / "link.jsonl"
    whole = write_lines(path, outputs)
    path.write_bytes(b'{"key": "cut\n' + whole)
    link.symlink_to(path)
    with Generations(link) as kept:
        assert kept.num_left == 3 and link.is_symlink() and path.read_bytes() == whole


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
    # else a busy machine's first round may count for nothing, and one more be made
    monkeypatch.setattr("evals.runs.rounds.STEADY", math.inf)
    path = tmp_path / "kept.jsonl"
    whole = make_suite()
    vanilla, block = whole.settings.cases
    expected = {case: whole.measure(case, three_rounds) for case in (vanilla, block)}

    suite = make_suite(resume=str(path))
    assert suite.resume_line() == f"blockinfer: 0 of 14 generations found in {path}"
    run = suite.measure(vanilla, three_rounds)
    assert run.resumed == 0 and len(run.seconds) == 3 and len(path.read_bytes().splitlines()) == 7
    append, number = Generations.append, 0

    def stops(self, settings, output, row_id):
        nonlocal number
        number += 1
        if number == 2:
            raise KeyboardInterrupt
        append(self, settings, output, row_id)

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
