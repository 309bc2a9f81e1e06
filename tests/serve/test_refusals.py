"""Every bad request gets its 4xx with OpenAI's error body: a sentence that names what is wrong, and the field."""

import json

import openai
import pytest

from tests.serve.conftest import MODEL

HI = [{"role": "user", "content": "hi"}]
CHAT = {"model": MODEL, "messages": HI}
COMPLETION = {"model": MODEL, "prompt": "hi"}

# of a chat: what is added to a good body, and what the message says
OF_CHATS = [
    ({"messages": None}, "messages: it must be a list of at least one message, got None"),
    ({"messages": []}, "at least one message"),
    ({"messages": "hi"}, "got 'hi'"),
    ({"messages": {"role": "user", "content": "hi"}}, "at least one message"),
    ({"messages": ["hi"]}, "message 0 must be an object with role and content"),
    ({"messages": [None]}, "message 0 must be an object"),
    ({"messages": [[]]}, "message 0 must be an object"),
    ({"messages": [{}]}, "the role of message 0 must be system, user or assistant, got None"),
    ({"messages": [{"content": "hi"}]}, "the role of message 0"),
    ({"messages": [{"role": "user"}]}, "the content of message 0 must be a string"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "got 'tool'"),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, "the role of message 0"),
    ({"messages": [*HI, {"role": "user", "content": None}]}, "the content of message 1"),
    ({"messages": [{"role": "user", "content": 5}]}, "got 5"),
    ({"messages": [{"role": "user", "content": []}]}, "the content of message 0"),
    ({"messages": [{"role": "user", "content": [5]}]}, "every part of the content of message 0"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "the text of a part of message 0"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "every part of"),
    ({"messages": [{"role": "user", "content": "hi", "name": "Tom"}]}, "message 0 has 'name'"),
    ({"messages": [{"role": "assistant", "content": "hi", "tool_calls": [{}]}]}, "message 0 has 'tool_calls'"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "lone surrogate"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "max_model_len=256"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens and max_completion_tokens are one limit"),
    ({"max_completion_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ({"max_completion_tokens": "5"}, "max_completion_tokens: input should be a valid integer, got '5'"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported: tools cannot be called"),
    ({"tool_choice": "required"}, "tool_choice is not supported"),
    ({"functions": [{}]}, "functions is not supported"),
    ({"parallel_tool_calls": 5}, "parallel_tool_calls is not supported: tools cannot be called"),
    ({"parallel_tool_calls": True, "tools": [{}]}, "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported: answers cannot be bound"),
    ({"logprobs": 5}, "logprobs: input should be a valid boolean, got 5"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: input should be less than or equal to 20"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs: input should be greater than or equal to 0"),
    ({"top_logprobs": 3}, "top_logprobs is for logprobs: set logprobs to true"),
    ({"modalities": ["text", "audio"]}, "modalities is not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort is not supported"),
    ({"store": True}, "store is not supported"),
    ({"metadata": {"a": "b"}}, "metadata is not supported"),
    ({"prompt": "hi"}, "there is no field prompt"),
]
# of a completion
OF_COMPLETIONS = [
    ({"prompt": None}, "prompt: it must be a string, a list of token ids, or a list of such, got None"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": []}, "got []"),
    ({"prompt": ["hi", ""]}, "prompt 1: the prompt is empty"),
    ({"prompt": [[]]}, "a list of token ids"),
    ({"prompt": [1, "hi"]}, "a list of token ids"),
    ({"prompt": [1.5]}, "a list of token ids"),
    ({"prompt": [True]}, "a list of token ids"),
    ({"prompt": [1, 300]}, "prompt token 1 must be an integer from 0 to 299, got 300"),
    ({"prompt": [-1]}, "prompt token 0 must be an integer from 0 to 299, got -1"),
    ({"prompt": 5}, "got 5"),
    ({"prompt": {"text": "hi"}}, "it must be a string"),
    ({"prompt": "a\udfff"}, "lone surrogate"),
    ({"prompt": [1] * 250}, "more than max_model_len=256; shorten the prompt or lower max_tokens"),
    ({"prompt": ["hi"] * 1000}, "1000 answers at once are more than the 260 that may run and wait here"),
    ({"echo": True}, "echo is not supported"),
    ({"suffix": "end"}, "suffix is not supported"),
    ({"best_of": 3}, "best_of is not supported"),
    ({"logprobs": True}, "logprobs: input should be a valid integer, got True"),
    ({"logprobs": -1}, "logprobs: input should be greater than or equal to 0"),
    ({"logprobs": 21}, "logprobs: input should be less than or equal to 20"),
    ({"top_logprobs": 3}, "top_logprobs is not supported: of a completion logprobs is their number"),
    ({"messages": HI}, "there is no field messages"),
]
# of both
OF_BOTH = [
    ({"model": None}, "model: input should be a valid string, got None"),
    ({"model": 5}, "model: input should be a valid string, got 5"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ({"max_tokens": -5}, "max_tokens must be at least 1, got -5"),
    ({"max_tokens": 1.5}, "max_tokens: input should be a valid integer"),
    ({"max_tokens": "10"}, "max_tokens: input should be a valid integer, got '10'"),
    ({"max_tokens": True}, "max_tokens: input should be a valid integer, got True"),
    ({"max_tokens": 100_000}, "more than max_model_len=256"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -0.1}, "temperature: input should be greater than or equal to 0, got -0.1"),
    ({"temperature": 2.1}, "temperature: input should be less than or equal to 2"),
    ({"temperature": "hot"}, "temperature: input should be a valid number, got 'hot'"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"seed": 2**64}, "seed must be below 2**64"),
    ({"seed": 1.5}, "seed: input should be a valid integer"),
    ({"stream": "yes"}, "stream: input should be a valid boolean, got 'yes'"),
    ({"stream": 1}, "stream: input should be a valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options is for a stream"),
    ({"stream": True, "stream_options": True}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage: input should be"),
    ({"stream": True, "stream_options": {"include_all": True}}, "stream_options.include_all"),
    ({"stream_mode": "denoise"}, "stream_mode is for a stream"),
    ({"stream": True, "stream_mode": "canvas"}, "stream_mode: input should be 'blocks' or 'denoise', got 'canvas'"),
    ({"n": 2}, "n=2 answers at temperature 0 would all be the same"),
    ({"n": 0}, "n must be at least 1, got 0"),
    ({"n": True}, "n must be an integer, got True"),
    ({"n": "2"}, "n must be an integer, got '2'"),
    ({"n": 500, "temperature": 1}, "500 answers at once are more than the 260 that may run and wait here"),
    ({"stop": ""}, "every one of stop must be a string of at least 1 character, got ''"),
    ({"stop": 5}, "stop must be a string or a list of strings, got 5"),
    ({"stop": ["a", None]}, "every one of stop must be a string"),
    ({"stop": "\ud800"}, "lone surrogate"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output needs stop strings"),
    ({"cfg_scale": -1}, "cfg_scale must be between 0.0 and"),
    ({"top_p": 0.9}, "top_p is not supported: temperature alone shapes the sampling here; got 0.9"),
    ({"top_k": 40}, "top_k is not supported"),
    ({"min_p": 0.1}, "min_p is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
    ({"presence_penalty": -1}, "presence_penalty is not supported"),
    ({"repetition_penalty": 1.2}, "repetition_penalty is not supported"),
    ({"logit_bias": {"5": 10}}, "logit_bias is not supported"),
    ({"bad_words": ["x"]}, "bad_words is not supported: no token but EOS can be forbidden here (logits_eos_inf)"),
    ({"guided_json": {}}, "guided_json is not supported"),
    ({"user": 5}, "user: input should be a valid string"),
    ({"service_tier": "flex"}, "service_tier is not supported"),
    ({"mode": "fast"}, "mode must be one of vanilla, prefix_cache, dual_cache, block, block_refresh, got 'fast'"),
    ({"mode": 5}, "mode must be one of"),
    ({"unmasking": "treshold"}, "did you mean 'threshold'?"),
    ({"threshold": 0.9}, "unmasking 'low_confidence' does not read threshold"),
    ({"unmasking": "threshold", "threshold": 1.5}, "threshold must be between 0.0 and 1.0, got 1.5"),
    ({"unmasking": "threshold", "threshold": "0.9"}, "threshold must be a finite number, got '0.9'"),
    ({"block_add_threshold": 1.5}, "block_add_threshold must be between 0.0 and 1.0, got 1.5"),
    ({"mode": "vanilla", "suffix_window": 8}, "mode 'vanilla' does not read suffix_window (only block and"),
    ({"commit_delay": -1}, "commit_delay must be at least 0, got -1"),
    ({"block_length": 0}, "block_length must be at least 1, got 0"),
    ({"block_length": "32"}, "block_length must be an integer, got '32'"),
    ({"denoising_steps": -1}, "denoising_steps must be at least 1, got -1"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids"),
    ({"stop_token_ids": [900]}, "stop_token_ids [900] are outside the 300 embeddings"),
    ({"ignore_eos": "no"}, "ignore_eos must be True or False"),
    ({"block_lenght": 32}, "there is no field block_lenght; did you mean 'block_length'?"),
    ({"safety_identifier": "me"}, "there is no field safety_identifier; leave it out"),
    ({"extra_body": {"mode": "block"}}, "there is no field extra_body; what it holds are fields of the body itself"),
    ({"max_new_tokens": 5}, "there is no field max_new_tokens; it is called max_tokens here"),
    ({"\ud800": 5}, "a field's name: input should be a valid string"),
    ({"x" * 5000: 5}, "there is no field xxx"),
]
# as they are sent
RAW = [
    (b"", "the body is not valid JSON"),
    (b"hi", "the body is not valid JSON"),
    (b"{", "the body is not valid JSON"),
    (b'{"model": "random", "prompt": "hi"', "the body is not valid JSON"),
    (b"\xff\xfe\x00", "the body is not valid JSON"),
    (b'{"model": "\xe4"}', "the body is not valid JSON"),
    (b"null", "the body must be a JSON object, got None"),
    (b"[]", "the body must be a JSON object"),
    (b'"hi"', "the body must be a JSON object"),
    (b"5", "the body must be a JSON object"),
    (b"{}", "is missing"),
    (b'{"model": "random"}', "is missing"),
    (b"[" * 100_000, "the body is nested too deeply"),
    (b'{"model": "random", "prompt": "hi", "messages": [], "temperature": NaN}', "NaN is no number of JSON"),
    (b'{"model": "random", "seed": Infinity}', "Infinity is no number of JSON"),
    (b'{"model": "random", "model": "other"}', "'model' stands twice"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "the body is not valid JSON"),
]


def told(answer, status=400):
    """The message of a refusal; its body is OpenAI's, and nothing else."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and len(error["message"]) < 500 and "Traceback" not in error["message"]
    return error["message"]


def post(server, path, body):
    headers = {"Content-Type": "application/json"}
    with server.client() as client:
        return client.post(path, content=body, headers=headers)


def test_there_are_more_than_sixty():
    assert len(OF_CHATS) + len(OF_COMPLETIONS) + 2 * len(OF_BOTH) + 2 * len(RAW) > 180


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "good", "cases"),
    [
        ("/v1/chat/completions", CHAT, OF_CHATS + OF_BOTH),
        ("/v1/completions", COMPLETION, OF_COMPLETIONS + OF_BOTH),
    ],
)
def test_bad_fields(server, path, good, cases, stream):
    headers = {"Content-Type": "application/json"}
    wrong = []
    with server.client() as client:
        for change, message in cases:
            streamed = {"stream": True} if stream and "is for a stream" not in message else {}
            answer = client.post(path, content=json.dumps(good | streamed | change), headers=headers)
            if message not in told(answer):
                wrong.append((change, answer.text))
        assert not wrong
        assert client.post(path, json=good | {"max_tokens": 4}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bad_bodies(server, path):
    for body, message in RAW:
        assert message in told(post(server, path, body)), body[:50]


def test_the_field_is_named(server):
    for change, param in [({"seed": -1}, "seed"), ({"tools": [{}]}, "tools"), ({"temperature": 3}, "temperature")]:
        answer = post(server, "/v1/completions", json.dumps(COMPLETION | change))
        assert answer.json()["error"]["param"] == param


def test_another_model(server):
    answer = post(server, "/v1/completions", json.dumps(COMPLETION | {"model": "gpt-4\ud800"}))
    assert r"there is no model 'gpt-4\ud800' here" in told(answer, 404)
    answer = post(server, "/v1/completions", json.dumps(COMPLETION | {"model": "gpt-4"}))
    assert told(answer, 404) == "there is no model 'gpt-4' here, only 'random'"
    assert answer.json()["error"]["code"] == "model_not_found"
    with server.client() as client:
        assert "no model 'x/y' here" in told(client.get("/v1/models/x/y"), 404)


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2", 404, "there is no GET /v2 here"),
        ("GET", "/docs", 404, "there is no GET /docs here"),
        ("POST", "/v1/embeddings", 404, "there is no POST /v1/embeddings here"),
        ("GET", "/v1/completions", 405, "GET /v1/completions: this path takes POST"),
        ("DELETE", "/v1/models", 405, "DELETE /v1/models: this path takes GET"),
    ],
)
def test_paths_and_methods(server, method, path, status, message):
    with server.client() as client:
        assert told(client.request(method, path), status) == message


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type(server, kind):
    """A page of another site can send these without being asked, and no others."""
    with server.client() as client:
        headers = {"Content-Type": kind} if kind else {}
        answer = client.post("/v1/completions", content=json.dumps(COMPLETION), headers=headers)
    assert "Content-Type: application/json, got" in told(answer, 415)


def test_a_content_type_with_a_charset(server):
    with server.client() as client:
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        body = json.dumps(COMPLETION | {"max_tokens": 1})
        assert client.post("/v1/completions", content=body, headers=headers).status_code == 200


def test_a_chat_template_that_refuses(server, monkeypatch):
    monkeypatch.setattr(server.llm.tokenizer, "chat_template", "{{ raise_exception('no system here') }}")
    message = told(post(server, "/v1/chat/completions", json.dumps(CHAT)))
    assert message.startswith("the chat template of ") and "no system here" in message


def test_what_the_openai_package_raises(server):
    with server.openai() as client:
        with pytest.raises(openai.BadRequestError, match="top_p is not supported") as caught:
            client.completions.create(model=MODEL, prompt="hi", top_p=0.5)
        assert caught.value.param == "top_p"
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here"):
            client.completions.create(model="gpt-4", prompt="hi")
