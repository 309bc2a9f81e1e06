"""Every wrong option and prompt gets an error that says what is wrong, where, and what was expected."""

import pytest
import torch

from blockinfer import LLM, SamplingParams


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": -3}, ValueError, "max_tokens must be at least 1, got -3"),
        ({"max_tokens": 1.5}, ValueError, "max_tokens must be an integer, got 1.5"),
        ({"max_tokens": True}, ValueError, "max_tokens must be an integer, got True"),
        ({"max_tokens": None}, ValueError, "max_tokens must be an integer, got None"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"block_length": "32"}, ValueError, "block_length must be an integer, got '32'"),
        ({"denoising_steps": 0}, ValueError, "denoising_steps must be at least 1, got 0"),
        ({"denoising_steps": 2.0}, ValueError, "denoising_steps must be an integer, got 2.0"),
        ({"mode": "dual"}, ValueError, "mode must be one of vanilla, .*got 'dual'"),
        ({"mode": "blocks"}, ValueError, "got 'blocks'; did you mean 'block'?"),
        ({"mode": None}, ValueError, "mode must be one of .*got None"),
        ({"unmasking": "treshold"}, ValueError, "got 'treshold'; did you mean 'threshold'?"),
        ({"unmasking": ["threshold"]}, ValueError, "unmasking must be one of"),
        (
            {"threshold": 0.9},
            ValueError,
            "'low_confidence' does not read threshold .only threshold and scheduled_threshold do., got",
        ),
        ({"unmasking": "threshold", "factor": 1.0}, ValueError, "'threshold' does not read factor .only factor does."),
        ({"unmasking": "factor", "entropy_bound": 0.1}, ValueError, "does not read entropy_bound .only entropy does."),
        ({"unmasking": "threshold", "threshold": 1.1}, ValueError, "threshold must be between 0.0 and 1.0, got 1.1"),
        ({"unmasking": "threshold", "threshold": -0.1}, ValueError, "threshold must be between 0.0 and 1.0, got -0.1"),
        ({"unmasking": "threshold", "threshold": float("nan")}, ValueError, "threshold must be a finite number"),
        ({"unmasking": "threshold", "threshold": "0.9"}, ValueError, "threshold must be a finite number, got '0.9'"),
        ({"unmasking": "factor", "factor": -1}, ValueError, "factor must be at least 0.0, got -1"),
        ({"unmasking": "entropy", "entropy_bound": float("inf")}, ValueError, "entropy_bound must be a finite number"),
        ({"temperature": -0.5}, ValueError, "temperature must be between 0.0 and 1000000.0, got -0.5"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite number, got nan"),
        ({"temperature": True}, ValueError, "temperature must be a finite number, got True"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be below 2"),
        ({"seed": 1.0}, ValueError, "seed must be an integer, got 1.0"),
        ({"stop_token_ids": [1, -1]}, ValueError, "stop_token_ids must be at least 0, got -1"),
        ({"stop_token_ids": ["a"]}, ValueError, "stop_token_ids must be an integer, got 'a'"),
        ({"stop_token_ids": 7}, ValueError, "stop_token_ids must be a list of token ids, got 7"),
        ({"ignore_eos": 1}, ValueError, "ignore_eos must be True or False, got 1"),
        ({"logits_eos_inf": "no"}, ValueError, "logits_eos_inf must be True or False, got 'no'"),
        ({"confidence_eos_eot_inf": None}, ValueError, "confidence_eos_eot_inf must be True or False, got None"),
        (
            {"unmasking": "sequential", "confidence_eos_eot_inf": True},
            ValueError,
            "'sequential' does not read confidence_eos_eot_inf",
        ),
        ({"max_token": 5}, TypeError, "unknown option 'max_token'; did you mean 'max_tokens'?"),
        ({"top_p": 0.9}, TypeError, "unknown option 'top_p'; there is no such filter here: temperature alone shapes"),
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": 1025, "temperature": 1.0}, ValueError, "n must be at most 1024, got 1025"),
        ({"n": 2}, ValueError, "n=2 answers at temperature 0 would all be the same"),
        ({"num_return_sequences": 2}, TypeError, "it is called n here"),
        ({"best_of": 2}, TypeError, "'best_of'; n answers are all given back"),
        ({"stop": 5}, ValueError, "stop must be a string or a list of strings, got 5"),
        ({"stop": ["a", ""]}, ValueError, "every one of stop must be a string of at least 1 character, got ''"),
        ({"stop": ["a", 5]}, ValueError, "every one of stop must be a string of at least 1 character, got 5"),
        ({"stop": "\ud800"}, ValueError, "every one of stop must be valid Unicode"),
        ({"until": "a"}, TypeError, "it is called stop here"),
        ({"include_stop_str_in_output": 1}, ValueError, "include_stop_str_in_output must be True or False, got 1"),
        ({"include_stop_str_in_output": True}, ValueError, "include_stop_str_in_output needs stop strings"),
        ({"logprobs": -1}, ValueError, "logprobs must be at least 0, got -1"),
        ({"logprobs": True}, ValueError, "logprobs must be an integer, got True"),
        ({"logprobs": 1001}, ValueError, "logprobs must be at most 1000, got 1001"),
        ({"prompt_logprobs": 1}, TypeError, "a prompt's tokens have no probabilities of their own"),
        ({"gen_length": 2}, TypeError, "unknown option 'gen_length'; it is called max_tokens here"),
        ({"max_new_tokens": 2}, TypeError, "it is called max_tokens here"),
        ({"num_to_transfer": 1}, TypeError, "denoising_steps say how many positions a step reveals at least; None is"),
        ({"eos_early_stop": True}, TypeError, "a stop token always ends a request, but for ignore_eos"),
        ({"steps": 2}, TypeError, "unknown option 'steps'; denoising_steps are those of one block"),
        ({"block_size": 2}, TypeError, "it is called block_length here"),
        ({"remasking": "random"}, TypeError, "it is called unmasking here"),
        ({"cfg_scale": -0.5}, ValueError, "cfg_scale must be between 0.0 and 1000000.0, got -0.5"),
        ({"cfg_scale": "1"}, ValueError, "cfg_scale must be a finite number, got '1'"),
        ({"cfg": 0.0}, TypeError, "it is called cfg_scale here"),
        ({"cache_delay_iter": 1}, TypeError, "it is called commit_delay here"),
        ({"refresh_interval": 4}, TypeError, "block_refresh does so at each block"),
        ({"guidance_scale": 1.0}, TypeError, "cfg_scale is LLaDA's: 0 is no guidance"),
        ({"max_model_len": 5}, TypeError, "unknown option 'max_model_len'; it is an option of LLM"),
        ({"what": 5}, TypeError, "unknown option 'what'; it takes max_tokens, block_length, .*eot_inf$"),
        ({"mode": "dual"}, ValueError, "got 'dual'; did you mean 'dual_cache'?"),
        ({"mode": "a" * 1000}, ValueError, r"got 'aaaa.*\.\.\. .1002 characters.$"),
        (
            {"max_tokens": 10**5000},
            ValueError,
            "max_tokens must be below 2..64, got something of type int that cannot be shown",
        ),
        (
            {"max_tokens": -(10**5000)},
            ValueError,
            "max_tokens must be at least 1, got something of type int that cannot be shown",
        ),
        ({"block_length": 2**64}, ValueError, "block_length must be below 2..64, got 18446744073709551616"),
        ({"temperature": 10**400}, ValueError, "temperature must be a finite number, got 1000.*401 characters"),
        ({"unmasking": "factor", "factor": 10**400}, ValueError, "factor must be a finite number, got 1000"),
        ({"stop_token_ids": {1}}, ValueError, "stop_token_ids must be a list of token ids, got {1}"),
    ],
)
def test_sampling_params(options, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_num_seq": 4}, TypeError, "LLM got an unknown option 'max_num_seq'; did you mean 'max_num_seqs'?"),
        (
            {"gpu_memory_utilization": 0.9},
            TypeError,
            "'gpu_memory_utilization'; kv_cache_memory, in bytes, bounds the KV",
        ),
        (
            {"trust_remote_code": True},
            TypeError,
            "'trust_remote_code'; a checkpoint's own code never runs; leave it out",
        ),
        ({"tensor_parallel_size": 0}, ValueError, "tensor_parallel_size must be at least 1, got 0"),
        (
            {"tensor_parallel_size": 3},
            ValueError,
            "config.json: tensor_parallel_size=3 does not divide n_heads=4 and n_kv_heads=4; this model can be shared "
            "by 1, 2, 4$",
        ),
        ({"tp_size": 2}, TypeError, "'tp_size'; it is called tensor_parallel_size here"),
        ({"block_size": 16}, TypeError, "'block_size'; it is called page_size here"),
        ({"max_tokens": 16}, TypeError, "'max_tokens'; it is an option of SamplingParams"),
        ({"gen_length": 16}, TypeError, "'gen_length'; in SamplingParams it is called max_tokens here"),
        ({"device": "cpu:3"}, ValueError, "device must be 'auto', 'cpu' or 'cuda', got 'cpu:3'"),
        ({"device": 0}, ValueError, "device must be 'auto', 'cpu' or 'cuda', got '0'"),
        ({"max_num_seqs": 10**9}, ValueError, r"GB are free: .* GB to work with .max_num_seqs=1000000000"),
        ({"kv_cache_memory": 10**5000}, ValueError, "kv_cache_memory must be below 2"),
        ({"page_size": 2**63}, ValueError, "needs .* GB on cpu, .* for the KV cache .kv_cache_memory, page_size"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of auto, float64, .*got 'int8'"),
        ({"dtype": "float"}, ValueError, "got 'float'; did you mean"),
        ({"dtype": torch.int32}, ValueError, "dtype must be one of .*got torch.int32"),
        ({"quantization": "fp9"}, ValueError, "quantization must be one of fp8, got 'fp9'"),
        ({"quantization": torch.float8_e4m3fn}, ValueError, "quantization must be one of fp8, got torch.float8_e4m3fn"),
        ({"load_in_8bit": True}, TypeError, "'load_in_8bit'; quantization='fp8' is what there is"),
        ({"device": "tpu"}, ValueError, "device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ({"device": "meta"}, ValueError, "device must be 'auto', 'cpu' or 'cuda', got 'meta'"),
        ({"load_format": "pt"}, ValueError, "load_format must be one of auto, dummy, got 'pt'"),
        ({"tokenizer": "no/such/folder/here"}, ValueError, "'no/such/folder/here' is no local folder"),
        ({"mask_token_id": -1}, ValueError, "mask_token_id must be at least 0, got -1"),
        ({"mask_token_id": 300}, ValueError, "mask_token_id=300 is outside the 300 embeddings"),
        ({"max_model_len": 0}, ValueError, "max_model_len must be at least 1, got 0"),
        ({"max_model_len": 257}, ValueError, "max_model_len=257 exceeds the 256 positions of the model's config"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_seqs": None}, ValueError, "max_num_seqs must be an integer, got None"),
        ({"max_num_batched_tokens": 255}, ValueError, "max_num_batched_tokens=255 must be at least max_model_len=256"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1, got 0"),
        ({"page_size": 16.0}, ValueError, "page_size must be an integer, got 16.0"),
        ({"kv_cache_memory": 100}, ValueError, "a KV cache of 100 bytes holds no page; one of 16 tokens takes 8192"),
        (
            {"kv_cache_memory": 2**62, "page_size": 2**40},
            ValueError,
            "needs 18,014,398.53 GB on cpu, .* GB are free: .* for the KV cache",
        ),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be below 2\\*\\*64"),
        ({"tokenizer": 5}, ValueError, "tokenizer must be a folder or a name on the Hub, got 5"),
        ({"tokenizer": ""}, ValueError, "tokenizer must be a folder or a name on the Hub, got ''"),
        ({"revision": 7}, ValueError, "revision must be .*, got 7"),
        ({"revision": "main"}, ValueError, "revision='main' is for a Hub name, and .* is a local folder"),
    ],
)
def test_llm_options(checkpoint, options, error, message):
    with pytest.raises(error, match=message):
        LLM(checkpoint, **{"device": "cpu", **options})


@pytest.mark.parametrize("model", [None, 5, "", b"folder"])
def test_a_model_that_is_no_name(model):
    with pytest.raises(ValueError, match="model must be a folder or a name on the Hub, got"):
        LLM(model, device="cpu")


def test_a_tokenizer_folder_without_its_file(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="there is no tokenizer.json; the fast tokenizer's file is expected"):
        LLM(checkpoint, tokenizer=tmp_path, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there(checkpoint):
    with pytest.raises(ValueError, match="device='cuda' was asked for, but this torch .* sees no GPU"):
        LLM(checkpoint, device="cuda")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty: it must have at least 1 token"),
        ([], None),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt_token_ids": "abc"}, "must be a string or a list of token ids, got str"),
        ({"prompt": 5}, '"prompt" must be a string, got int'),
        ({"prompt": ""}, "the prompt is empty"),
        ({1: 2, "a": 3}, r"""a dict prompt has "prompt" or "prompt_token_ids", got the keys \[1, 'a'\]"""),
        ({"prompt_token_ids": [1], "multi_modal": 1}, "got the keys"),
        ({}, "got the keys"),
        ([[1, 2], [3, 300]], "prompt 1: prompt token 1 must be an integer from 0 to 299, got 300"),
        ([[-1]], "prompt 0: prompt token 0 must be an integer from 0 to 299, got -1"),
        ([[1, 2.5]], "prompt token 1 must be an integer from 0 to 299, got 2.5"),
        ([[1, "a"]], "prompt token 1 must be"),
        ([[True]], "prompt token 0 must be"),
        ([None], "prompt 0: a prompt must be a string or a list of token ids, got NoneType"),
        (5, "prompts must be a prompt or a list of prompts, got int"),
        (None, "prompts must be a prompt or a list of prompts, got NoneType"),
        ([[1] * 200], "the prompt's 200 tokens and max_tokens=128 make 328, more than max_model_len=256"),
        (["x", "\ud800"], r"prompt 1: the prompt must be valid Unicode, got a lone surrogate, '\\ud800'"),
        (["x" * 300], "the prompt's 301 tokens and max_tokens=128 make 429"),
        (["x", "x" * 10**8], "prompt 1: the prompt's 100000000 characters cannot fit max_model_len=256"),
        (
            [[10**5000]],
            "prompt token 0 must be an integer from 0 to 299, got something of type int that cannot be shown",
        ),
    ],
)
def test_prompts(llm, prompt, message):
    if message is None:
        assert llm.generate(prompt, use_tqdm=False) == []
        return
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, use_tqdm=False)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([SamplingParams()] * 3, "there are 2 prompts but 3 params"),
        ({"max_tokens": 5}, "params must be a SamplingParams or one for each prompt, got dict"),
        ([SamplingParams(), {"max_tokens": 3}], "prompt 1: params must be a SamplingParams, got dict"),
        (SamplingParams(stop_token_ids=[5, 300]), r"stop_token_ids \[300\] are outside the 300 embeddings"),
        (SamplingParams(logprobs=301), "logprobs=301 is more than vocab_size=300"),
        (SamplingParams(max_tokens=256), "tokens and max_tokens=256 make 257, more than max_model_len=256"),
    ],
)
def test_params_of_generate(llm, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([[1], [2]], params, use_tqdm=False)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "chat needs at least one message"),
        ("hello", "must be a list of {'role': ..., 'content': ...}, got str"),
        ([{"role": "user"}], "conversation 0: message 0 must be .*got the keys .'role'"),
        ([[{"role": "user", "content": "a"}], []], "conversation 1: it has no messages"),
        ([{"role": "user", "content": 5}], "message 0 must be .*, got role of type str and content of type int"),
        (
            [{"role": "user", "content": "\ud800"}],
            "conversation 0: the prompt must be valid Unicode, got a lone surrogate",
        ),
        ([{"role": "user", 1: 5}], "conversation 0: message 0 must be .*got the keys"),
        (["hi"], "conversation 0: it must be a list of .*, got str"),
        ([1, 2], "conversation 0: it must be a list of .*, got int"),
    ],
)
def test_conversations(llm, messages, message):
    with pytest.raises(ValueError, match=message):
        llm.chat(messages, use_tqdm=False)


def test_a_request_that_the_pages_can_never_hold(checkpoint):
    page_bytes = 2 * 2 * 32 * 4 * 16
    with LLM(checkpoint, device="cpu", kv_cache_memory=3 * page_bytes) as llm:
        with pytest.raises(ValueError, match="10 tokens and max_tokens=39 need 4 pages of 16 .* has 3"):
            llm.generate([1] * 10, SamplingParams(max_tokens=39))
        assert llm.generate([1] * 10, SamplingParams(max_tokens=38), use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"params": SamplingParams()}, TypeError, "unknown option 'params'; it is called sampling_params here"),
        ({"sampling_param": SamplingParams()}, TypeError, "'sampling_param'; it is called sampling_params here"),
        ({"max_tokens": 5}, TypeError, "unknown option 'max_tokens'; it is an option of SamplingParams"),
        ({"gen_length": 5}, TypeError, "unknown option 'gen_length'; in SamplingParams it is called max_tokens here"),
        ({"lora_request": None}, TypeError, "unknown option 'lora_request'; there are no adapters here"),
        ({"on_finished": print}, TypeError, "unknown option 'on_finished'; did you mean 'on_finish'?"),
        ({"on_finish": 5}, ValueError, "on_finish must be a function of one output, got 5"),
        ({"use_tqdm": None}, ValueError, "use_tqdm must be True or False, got None"),
        (
            {"sampling_params": 5},
            ValueError,
            "sampling_params must be a SamplingParams or one for each prompt, got int",
        ),
    ],
)
def test_options_of_generate_and_chat(llm, options, error, message):
    options = {"use_tqdm": False} | options
    with pytest.raises(error, match=message):
        llm.generate([1], **options)
    with pytest.raises(error, match=message):
        llm.chat([{"role": "user", "content": "hi"}], **options)


@pytest.mark.parametrize("request_id", [-1, None, "x", [1], 10**400])
def test_an_id_that_no_request_has(llm, request_id):
    with pytest.raises(ValueError, match="there is no unfinished request "):
        llm.engine.abort(request_id)


@pytest.mark.parametrize("kind", [Exception, type("PanicException", (BaseException,), {})])
@pytest.mark.parametrize(
    ("method", "message"),
    [("encode", "prompt 0: the tokenizer cannot encode the prompt"), ("decode", "cannot decode the tokens of request")],
)
def test_a_tokenizer_that_fails(llm, monkeypatch, kind, method, message):
    """The library's errors are bare Exceptions, or panics, which are none."""

    def fail(*_, **__):
        raise kind("Regex search error: retry-limit-in-match over")

    monkeypatch.setattr(llm.tokenizer, method, fail)
    with pytest.raises(ValueError, match=f"{message}.*: Regex search error"):
        llm.generate("hi", SamplingParams(max_tokens=4), use_tqdm=False)
