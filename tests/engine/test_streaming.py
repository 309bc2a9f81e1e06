"""Outputs of unfinished requests: what is told is final, complete, and costs the others nothing."""

import sys

import pytest

from blockinfer import SamplingParams
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from blockinfer.engine.text import settled
from tests.engine.test_ahead import params, reads  # noqa: F401

PROMPT = [1, 2, 3, 4, 5]


def tell(engine):
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    return outputs


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_a_stream_tells_of_each_block_and_ends_as_generate_does(llm, mode, rule):
    stops = list(range(0, 300, 9))
    options = params(rule, mode=mode, max_tokens=14, ignore_eos=False, stop_token_ids=stops, seed=5)
    for prompt in ([1], [7, 8], [30, 4, 99], [5, 50, 150, 250]):
        (expected,) = llm.generate([prompt], options, use_tqdm=False)
        *partial, last = llm.stream(prompt, options)
        assert last.finished and last.outputs == expected.outputs and last.metrics.nfe == expected.metrics.nfe
        whole = expected.outputs[0]
        assert [len(o.outputs[0].token_ids) for o in partial] == [4, 8, 12][: len(partial)]
        assert len(partial) == min(3, len(whole.token_ids) // 4)
        for output in partial:
            (so_far,) = output.outputs
            assert not output.finished and so_far.finish_reason is None and so_far.canvas is None
            assert whole.token_ids[: len(so_far.token_ids)] == so_far.token_ids
            assert whole.text.startswith(so_far.text)


def test_blocks_come_when_they_are_finished(llm):
    *partial, last = llm.stream(PROMPT, params("low_confidence"))
    assert [(len(o.outputs[0].token_ids), o.metrics.nfe) for o in partial] == [(4, 4), (8, 8)]
    assert (len(last.outputs[0].token_ids), last.metrics.nfe) == (10, 10)


def test_only_who_asks_is_told(llm):
    ids = [llm.engine.add_request(PROMPT, params("low_confidence"), stream=s) for s in (None, "blocks", "denoise")]
    told = tell(llm.engine)
    assert [sum(o.request_id == i for o in told) for i in ids] == [1, 3, 10]
    finished = [o for o in told if o.finished]
    assert [o.request_id for o in finished] == ids
    assert all(o.outputs[0].token_ids == finished[0].outputs[0].token_ids for o in finished)


def test_a_stream_waits_for_the_device_no_more_often(llm, reads):  # noqa: F811
    list(llm.stream(PROMPT, params("low_confidence")))
    assert reads == [4, 8, 10]


def test_a_canvas_makes_every_step_wait(llm, reads):  # noqa: F811
    list(llm.stream(PROMPT, params("low_confidence"), denoise=True))
    assert reads == list(range(1, 11))


@pytest.mark.parametrize("rule", RULES)
def test_a_canvas_is_filled_with_what_its_block_becomes(llm, rule):
    outputs = list(llm.stream(PROMPT, params(rule, denoising_steps=3), denoise=True))
    assert sum(o.outputs[0].canvas is not None for o in outputs) > 2
    whole, open_block = outputs[-1].outputs[0].token_ids, (None,) * 4
    for output in outputs:
        (so_far,) = output.outputs
        if so_far.canvas is None:
            open_block = (None,) * 4
            continue
        start = len(so_far.token_ids)
        known = [i for i, token in enumerate(so_far.canvas) if token is not None]
        assert all(so_far.canvas[i] == whole[start + i] for i in known)
        assert len(known) > sum(token is not None for token in open_block)
        assert all(so_far.canvas[i] == token for i, token in enumerate(open_block) if token is not None)
        open_block = so_far.canvas


def test_half_a_character_is_not_told(llm, monkeypatch):
    """Three bytes of one character, one a block."""
    tokenizer = llm.tokenizer
    euro = [tokenizer.convert_tokens_to_ids(t) for t in tokenizer.tokenize("€")]
    assert len(euro) == 3
    read, blocks = llm.engine.runner._read, iter([[euro[0]], [euro[1]], [euro[2]], [euro[0]], [euro[1]]])
    monkeypatch.setattr(llm.engine.runner, "_read", lambda s: [r._replace(token_ids=next(blocks)) for r in read(s)])
    outputs = list(llm.stream(PROMPT, SamplingParams(max_tokens=5, block_length=1, ignore_eos=True)))
    assert [o.outputs[0].text for o in outputs] == ["", "", "€", "€", "€\N{REPLACEMENT CHARACTER}"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "before", "stop", "expected"),
    [
        ("abc", "", [], "abc"),
        ("abc\ufffd\ufffd", "", [], "abc"),
        ("a\ufffdbc", "", [], "a\ufffdbc"),
        ("one STO", "", ["STOP"], "one "),
        ("one STO", "", ["TOP", "STOP"], "one "),
        ("one TO", "", ["TOP", "XTOP"], "one "),
        ("aab", "", ["ab!", "b?"], "a"),
        ("abab", "", ["ababc"], ""),
        ("one", "", ["STOP"], "one"),
        ("other", "text", [], "text"),
        ("text and", "text", [], "text and"),
    ],
)
def test_text_that_can_still_change(text, before, stop, expected):
    assert settled(text, before, stop) == expected


def test_a_stream_that_is_left_leaves_an_empty_engine(llm):
    stream = llm.stream(PROMPT, params("low_confidence"))
    next(stream)
    assert llm.engine.has_unfinished()
    stream.close()
    assert not llm.engine.has_unfinished()


def test_two_streams_at_once_are_refused(llm):
    stream = llm.stream(PROMPT, params("low_confidence"))
    next(stream)
    with pytest.raises(RuntimeError, match="the engine has unfinished requests"):
        next(llm.stream(PROMPT))
    stream.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"denoise": 1}, "denoise must be True or False, got 1"), ({"sampling_params": 5}, "params must be a Sampl")],
)
def test_bad_options(llm, options, message):
    with pytest.raises(ValueError, match=message):
        list(llm.stream(PROMPT, **options))
    for prompts in (["a", "b"], []):
        with pytest.raises(ValueError, match=f"stream takes one prompt, got {len(prompts)}; generate takes several"):
            list(llm.stream(prompts))
    with pytest.raises(TypeError, match="unknown option 'max_tokens'; it is an option of SamplingParams"):
        llm.stream(PROMPT, max_tokens=4)
    with pytest.raises(ValueError, match="stream must be one of blocks, denoise, got 'block'; did you mean 'blocks'?"):
        llm.engine.add_request(PROMPT, stream="block")


@pytest.mark.parametrize("at", range(0, 60, 7))
def test_ctrl_c_loses_no_block(llm, monkeypatch, at):
    """Cut short before any of its lines, a step is made up for."""
    expected = [o.outputs[0].token_ids for o in llm.stream(PROMPT, params("low_confidence", max_tokens=6))][-1]
    engine, lines = llm.engine, iter(range(1_000_000))
    engine.add_request(PROMPT, params("low_confidence", max_tokens=6), stream="blocks")

    def trace(frame, event, _):
        if "blockinfer/engine/engine.py" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(lines) == 150 + at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    told, cut = [], 0
    sys.settrace(trace)
    try:
        while True:
            # this line of the engine's too
            try:
                if not engine.has_unfinished():
                    break
                told += engine.step()
            except KeyboardInterrupt:
                cut += 1
    finally:
        sys.settrace(None)
    assert cut == 1
    assert told[-1].finished and told[-1].outputs[0].token_ids == expected
    seen = [len(o.outputs[0].token_ids) for o in told]
    assert seen == sorted(seen) and sum(o.finished for o in told) == 1


def test_an_output_that_cannot_be_decoded_takes_no_other_with_it(llm, monkeypatch):
    """Both end in the same step; the first one's error comes once the second one is out."""
    decode = llm.tokenizer.decode
    options = params("low_confidence", max_tokens=4)
    ids = [llm.engine.add_request([p], options) for p in (1, 2)]
    calls = iter(range(100))

    def fail(*args, **options):
        if next(calls) == 0:
            raise RuntimeError("no")
        return decode(*args, **options)

    monkeypatch.setattr(llm.tokenizer, "decode", fail)
    outputs = [output for _ in range(4) for output in llm.engine.step()]
    assert [o.request_id for o in outputs] == ids[1:]
    with pytest.raises(ValueError, match="cannot decode the tokens of request") as caught:
        llm.engine.step()
    assert caught.value.request_ids == ids[:1]
    llm.engine.abort(ids[0])
    assert not llm.engine.has_unfinished()


def test_a_stop_string_s_beginning_is_not_told(llm, monkeypatch):
    """Block by block "a", "b", "c": of the stop "bc" nothing is told, and of "bx" all once it cannot come any more."""
    a, b, c = (llm.tokenizer.encode(text, add_special_tokens=False)[0] for text in "abc")
    read = llm.engine.runner._read

    def texts(**options):
        blocks = iter([[a], [b], [c], [a]])
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.runner, "_read", lambda s: [r._replace(token_ids=next(blocks)) for r in read(s)])
            stream = llm.stream(PROMPT, SamplingParams(max_tokens=4, block_length=1, ignore_eos=True, **options))
            return [(o.outputs[0].text, o.outputs[0].finish_reason) for o in stream]

    assert texts(stop="bc") == [("a", None), ("a", None), ("a", "stop")]
    assert texts(stop=["bc"], include_stop_str_in_output=True)[-2:] == [("a", None), ("abc", "stop")]
    assert texts(stop="bx") == [("a", None), ("a", None), ("abc", None), ("abca", "length")]


def test_several_answers_are_streamed_together(llm):
    options = params("random", n=3, seed=7, stop_token_ids=list(range(0, 300, 6)), max_tokens=12)
    (expected,) = llm.generate([PROMPT], options, use_tqdm=False)
    *partial, last = llm.stream(PROMPT, options)
    assert last.outputs == expected.outputs and len(partial) >= 2
    for output in partial:
        assert [one.index for one in output.outputs] == [0, 1, 2]
        for one, whole in zip(output.outputs, expected.outputs, strict=True):
            assert whole.token_ids[: len(one.token_ids)] == one.token_ids and whole.text.startswith(one.text)
            assert one.finish_reason in (None, whole.finish_reason)
            assert one == whole or one.finish_reason is None


def test_log_probabilities_are_streamed(llm):
    options = params("low_confidence", logprobs=1)
    (expected,) = llm.generate([PROMPT], options, use_tqdm=False)
    *partial, last = llm.stream(PROMPT, options)
    assert last.outputs == expected.outputs
    for output in partial:
        (one,) = output.outputs
        assert one.logprobs == expected.outputs[0].logprobs[: len(one.token_ids)]


def test_masked_spans_are_not_streamed(llm):
    with pytest.raises(ValueError, match="masked spans are filled between text that stays, and cannot be streamed"):
        list(llm.stream({"prompt": "1 + {fill:2} = 5"}, SamplingParams(mode="vanilla")))
