"""The engine's face, as a user meets it."""

import dataclasses
import json
import re
import time
import weakref

import pytest
import torch

from blockinfer import LLM, RequestOutput, SamplingParams
from blockinfer.decoding.modes import MODES
from blockinfer.decoding.unmasking import RULES
from tests.checkpoints import write_checkpoint

GREEDY = SamplingParams(max_tokens=12, block_length=4, ignore_eos=True)
AT_ONCE = SamplingParams(max_tokens=8, block_length=8, unmasking="threshold", threshold=0.0, ignore_eos=True)


def generate(llm, prompts, params=GREEDY, **options):
    return llm.generate(prompts, params, use_tqdm=False, **options)


def test_a_string_its_ids_and_a_dict_are_the_same_prompt(llm):
    ids = llm.tokenizer.encode("hello there")
    outputs = generate(llm, ["hello there", ids, {"prompt_token_ids": ids}])
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert [o.prompt for o in outputs] == ["hello there", None, None]
    assert all(isinstance(o, RequestOutput) and o.finished and o.prompt_token_ids == ids for o in outputs)


def test_a_string_gets_the_tokenizer_s_special_tokens(llm):
    bos = llm.tokenizer.convert_tokens_to_ids("<|startoftext|>")
    (output,) = generate(llm, "abc")
    assert output.prompt_token_ids == [bos, *llm.tokenizer.encode("abc", add_special_tokens=False)]


def test_one_prompt_needs_no_list(llm):
    assert [len(generate(llm, prompt)) for prompt in ("hello", [1, 2, 3], {"prompt_token_ids": [1, 2, 3]})] == [1, 1, 1]
    assert generate(llm, []) == []


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = [[i + 1] * (i % 5 + 1) for i in range(20)]
    params = [dataclasses.replace(GREEDY, max_tokens=20 - i) for i in range(20)]
    seen = []
    outputs = generate(llm, prompts, params, on_finish=lambda o: seen.append(o.request_id))
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]
    assert sorted(seen) == [o.request_id for o in outputs] and seen != sorted(seen)


def test_sampling_params_is_a_keyword_too(llm):
    expected = generate(llm, "abc")[0].outputs
    assert llm.generate("abc", sampling_params=GREEDY, use_tqdm=False)[0].outputs == expected
    conversation = [{"role": "user", "content": "hi"}]
    by_place, by_name = llm.chat(conversation, GREEDY), llm.chat(conversation, sampling_params=[GREEDY], use_tqdm=False)
    assert by_place[0].outputs == by_name[0].outputs and len(by_name[0].outputs[0].token_ids) == 12


def test_requests_of_one_seed_share_their_noise(llm):
    seeded = dataclasses.replace(GREEDY, temperature=1.0, seed=7)
    first, second = generate(llm, [[1, 2], [1, 2]], seeded)
    assert first.outputs == second.outputs


def test_text_is_the_decoded_tokens(llm):
    completion = generate(llm, "abc")[0].outputs[0]
    assert completion.index == 0
    assert completion.text == llm.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_a_stop_token_ends_the_output_before_it(llm):
    params = dataclasses.replace(GREEDY, max_tokens=30)
    free = generate(llm, [3, 1, 4], params)[0].outputs[0]
    assert (free.finish_reason, free.stop_reason, len(free.token_ids)) == ("length", None, 30)
    stop = free.token_ids[9]
    first = free.token_ids.index(stop)
    cut = generate(llm, [3, 1, 4], dataclasses.replace(params, stop_token_ids=[stop]))[0]
    assert cut.outputs[0].token_ids == free.token_ids[:first]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    # blocks after the one with the stop token are not decoded
    assert cut.metrics.nfe == (first // 4 + 1) * 4


@pytest.mark.parametrize("named", ["as one", "in a list", "by generation_config", "by generation_config alone"])
def test_the_checkpoint_s_eos_stops_unless_ignored(tmp_path, llm, checkpoint, named):
    eos = generate(llm, [3, 1, 4])[0].outputs[0].token_ids[5]
    mask = llm.config.mask_token_id
    in_config = {"as one": eos, "in a list": [299, eos], "by generation_config": 299}.get(named, [])
    write_checkpoint(tmp_path, vocab_size=300, eos_token_id=in_config, mask_token_id=mask)
    if "generation" in named:
        (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": [mask, eos]}))
    with LLM(tmp_path, device="cpu", dtype="float64") as other:
        stopped = generate(other, [3, 1, 4], dataclasses.replace(GREEDY, ignore_eos=False))[0].outputs[0]
        ignored = generate(other, [3, 1, 4], GREEDY)[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", eos)
    assert ignored.finish_reason == "length" and eos in ignored.token_ids


def test_end_of_turn_is_a_stop_where_the_tokenizer_has_it(llm):
    eot = llm.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert llm.engine.stop_token_ids == {*llm.model_config.eos_token_ids, eot}


def test_chat_applies_the_template_and_adds_no_second_bos(llm):
    conversation = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt == llm.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    bos = llm.tokenizer.convert_tokens_to_ids("<|startoftext|>")
    assert output.prompt_token_ids[0] == bos and output.prompt_token_ids.count(bos) == 1
    assert len(llm.chat([conversation, conversation], GREEDY, use_tqdm=False)) == 2


def test_seeds(llm):
    hot = dataclasses.replace(GREEDY, temperature=1.0)
    first, second = generate(llm, [[1, 2], [1, 2]], hot)
    assert first.metrics.seed != second.metrics.seed
    again = generate(llm, [1, 2], dataclasses.replace(hot, seed=first.metrics.seed))[0]
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    others = [generate(llm, [1, 2], dataclasses.replace(hot, seed=s))[0].outputs[0].token_ids for s in range(3)]
    assert len(set(map(tuple, others))) == 3


def test_the_engine_s_seed_repeats_its_draws(checkpoint):
    def draws(seed):
        with LLM(checkpoint, device="cpu", seed=seed) as llm:
            return [o.metrics.seed for o in generate(llm, [[1], [2]])]

    assert draws(5) == draws(5) != draws(6) and len(set(draws(5))) == 2


def test_a_mask_token_in_the_prompt_stays_what_it_is(llm):
    mask = llm.config.mask_token_id
    output = generate(llm, [4, mask, mask, 5])[0]
    assert output.prompt_token_ids == [4, mask, mask, 5]
    assert mask not in output.outputs[0].token_ids
    assert output.metrics.denoising_steps == 12


@pytest.fixture
def llm_whose_eos_is_likely(tmp_path, llm):
    """An engine whose EOS is what the model predicts first at some position, under threshold 0 in one step."""
    eos = generate(llm, [3, 1, 4], AT_ONCE)[0].outputs[0].token_ids[0]
    write_checkpoint(tmp_path, vocab_size=300, eos_token_id=eos, mask_token_id=llm.config.mask_token_id)
    with LLM(tmp_path, device="cpu", dtype="float64") as other:
        assert eos in generate(other, [3, 1, 4], AT_ONCE)[0].outputs[0].token_ids
        yield other


def test_logits_eos_inf_forbids_the_eos_token(llm_whose_eos_is_likely):
    (eos,) = llm_whose_eos_is_likely.model_config.eos_token_ids
    output = generate(llm_whose_eos_is_likely, [3, 1, 4], dataclasses.replace(AT_ONCE, logits_eos_inf=True))[0]
    assert output.metrics.nfe == 1 and eos not in output.outputs[0].token_ids


def test_confidence_eos_eot_inf_reveals_the_eos_token_last(llm_whose_eos_is_likely):
    held = dataclasses.replace(AT_ONCE, confidence_eos_eot_inf=True)
    assert generate(llm_whose_eos_is_likely, [3, 1, 4], AT_ONCE)[0].metrics.nfe == 1
    assert generate(llm_whose_eos_is_likely, [3, 1, 4], held)[0].metrics.nfe > 1


def test_the_engine_underneath(llm):
    engine = llm.engine
    ids = [engine.add_request([1, 2, 3], GREEDY), engine.add_request([4], dataclasses.replace(GREEDY, max_tokens=4))]
    dropped = engine.add_request([5, 6])
    with pytest.raises(RuntimeError, match="unfinished"):
        generate(llm, [1])
    engine.abort(dropped)
    finished = []
    while engine.has_unfinished():
        finished += engine.step()
    assert [o.request_id for o in finished] == ids[::-1]
    assert engine.step() == []
    with pytest.raises(ValueError, match=f"no unfinished request {dropped}"):
        engine.abort(dropped)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["forward", "on_finish"])
def test_generate_leaves_an_empty_usable_engine_after_an_exception(llm, monkeypatch, error, where):
    expected = generate(llm, [1, 2, 3])[0].outputs[0].token_ids
    prompts = [[1, 2, 3]] * 12

    def fail(*args, **kwargs):
        raise error("planted")

    with monkeypatch.context() as patch, pytest.raises(error, match="planted"):
        if where == "forward":
            steps = iter(range(100))
            run = llm.engine.runner.run
            patch.setattr(llm.engine.runner, "run", lambda s: run(s) if next(steps) < 5 else fail())
        generate(llm, prompts, on_finish=fail)
    assert not llm.engine.has_unfinished()
    assert generate(llm, [1, 2, 3])[0].outputs[0].token_ids == expected


def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(llm):
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        generate(llm, [[1], [], [2]])
    assert not llm.engine.has_unfinished()


def test_a_closed_llm_gives_its_memory_back(checkpoint):
    llm = LLM(checkpoint, device="cpu")
    pages = weakref.ref(llm.engine.runner.kv_pages)
    llm.close()
    assert pages() is None


def test_close_and_context_manager(checkpoint):
    with LLM(checkpoint, device="cpu") as llm:
        generate(llm, [1])
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        generate(llm, [1])
    with pytest.raises(RuntimeError, match="closed"):
        _ = llm.stats


def test_metrics_add_up(llm):
    metrics = generate(llm, [1, 2, 3])[0].metrics
    assert 0 <= metrics.queued_seconds <= metrics.first_block_seconds <= metrics.total_seconds
    assert metrics.nfe == metrics.denoising_steps == 12


def test_times_are_of_the_first_forward_and_of_the_first_block_s_end(llm):
    """Between the times before and after the step in question; blocks are of four steps."""
    times = [time.perf_counter()]
    llm.engine.add_request([1, 2, 3], GREEDY)
    outputs = []
    while not outputs:
        times.append(time.perf_counter())
        outputs = llm.engine.step()
    metrics, (start, added, *later) = outputs[0].metrics, times
    assert metrics.queued_seconds <= later[0] - start
    assert later[2] - added <= metrics.first_block_seconds <= later[3] - start
    assert metrics.total_seconds >= later[-1] - added


def test_options_of_a_rule_are_resolved_on_use_and_never_written_back():
    params = SamplingParams(unmasking="threshold")
    assert params.threshold is None and params.rule_value == 0.9
    assert dataclasses.replace(params, unmasking="entropy").rule_value == 0.15
    assert dataclasses.replace(params, threshold=0.5).rule_value == 0.5


def test_the_help_names_every_mode_and_rule():
    described = re.search(
        r"mode: .*?threshold, factor, entropy_bound, entropy_threshold:", SamplingParams.__doc__, re.DOTALL
    )[0]
    assert {*MODES, *RULES} <= set(re.findall(r"\w+", described))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.float32])
def test_dtypes(checkpoint, dtype):
    with LLM(checkpoint, device="cpu", dtype=dtype) as llm:
        assert len(generate(llm, [1, 2, 3])[0].outputs[0].token_ids) == 12
        assert llm.config.dtype in (dtype, getattr(torch, str(dtype), None))


def test_auto_is_float32_on_a_cpu(checkpoint):
    with LLM(checkpoint, device="cpu") as llm:
        assert (llm.config.dtype, llm.config.device.type) == (torch.float32, "cpu")


def test_dummy_weights_need_no_files_and_repeat(tmp_path, checkpoint):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    outputs = []
    for seed in (0, 0, 1):
        with LLM(tmp_path, load_format="dummy", device="cpu", seed=seed) as llm:
            assert llm.tokenizer is None
            outputs.append(generate(llm, [1, 2, 3])[0].outputs[0])
    assert outputs[0].token_ids == outputs[1].token_ids != outputs[2].token_ids
    assert outputs[0].text is None


def test_dummy_weights_can_borrow_a_tokenizer(tmp_path, checkpoint):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with LLM(tmp_path, load_format="dummy", device="cpu", tokenizer=checkpoint) as llm:
        assert generate(llm, "hello")[0].outputs[0].text is not None


def test_a_hub_name_is_fetched_without_its_code(checkpoint, monkeypatch):
    asked = []

    def fetch(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(checkpoint)

    monkeypatch.setattr("blockinfer.checkpoint.snapshot_download", fetch)
    with LLM("some/model", revision="v2", device="cpu") as llm:
        assert llm.tokenizer is not None and len(generate(llm, "hi")) == 1
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("some/model", "v2")
    assert {"*.json", "*.safetensors"} <= set(patterns) and not any(p.endswith((".py", "*")) for p in patterns)


def test_a_dummy_of_a_hub_name_fetches_its_config_alone(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr("blockinfer.checkpoint.snapshot_download", lambda *a, **k: asked.append(k) or str(checkpoint))
    with LLM("some/model", load_format="dummy", device="cpu"):
        assert [k["allow_patterns"] for k in asked] == [["config.json"]]


def test_params_keep_their_own_copy_and_can_be_a_key():
    stops = [1, 2]
    params = SamplingParams(stop_token_ids=stops)
    stops.append("x")
    assert params.stop_token_ids == (1, 2)
    assert {params: 1}[dataclasses.replace(params)] == 1


def test_a_prompt_in_a_dict(llm):
    by_name, plain, both = generate(llm, [{"prompt": "hi"}, "hi", {"prompt": "x", "prompt_token_ids": [5]}])
    assert by_name.outputs == plain.outputs and by_name.prompt_token_ids == plain.prompt_token_ids
    assert (both.prompt, both.prompt_token_ids) == ("x", [5])


def test_a_position_needs_a_token_that_it_can_become(tmp_path):
    """The first checkpoint's only token is EOS, the second's the mask."""
    for name, ids, flag in (("eos", (0, 1), True), ("mask", (1, 0), False)):
        folder = write_checkpoint(
            tmp_path / name, vocab_size=1, embedding_size=2, eos_token_id=ids[0], mask_token_id=ids[1]
        )
        with LLM(folder, device="cpu") as llm:
            with pytest.raises(
                ValueError, match="vocab_size=1 leaves no token to predict besides the mask token" + ".*EOS" * flag
            ):
                llm.generate([1], SamplingParams(logits_eos_inf=flag))
            if flag:
                assert llm.generate([1], use_tqdm=False)[0].outputs[0].stop_reason == 0


def test_eos_flags_need_an_eos_token(tmp_path):
    with LLM(write_checkpoint(tmp_path, eos_token_id=[]), device="cpu") as llm:
        for flag in ("logits_eos_inf", "confidence_eos_eot_inf"):
            with pytest.raises(ValueError, match=f"{flag} acts on the EOS token, and this checkpoint names none"):
                llm.generate([1], SamplingParams(**{flag: True}))
