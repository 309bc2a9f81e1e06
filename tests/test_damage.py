"""Anything at all in the place of a value or a byte: it works, or one line says what is wrong. Nothing hangs."""

import json
import shutil
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockinfer import LLM, SamplingParams
from tests.checkpoints import write_checkpoint, write_tokenizer

BIG = [10**9, 2**31, 2**63, 10**400]
ODD = [None, True, 0, 1, -1, 7, 1.5, 1e-320, float("nan"), float("inf"), "", "x", "../x", "a" * 5000, "\0", "\ud800"]
JSON = [*BIG, *ODD, [], [1], [[]], ["a"], {}, {"a": 1}]
OBJECTS = [*JSON, -(10**400), 1j, b"x", (1,), {1}, range(3), object, print, Exception("x"), "cpu", "block"]
SAMPLING = [*SamplingParams.__dataclass_fields__, "top_p"]
OPTIONS = ["dtype", "device", "load_format", "mask_token_id", "max_model_len", "max_num_seqs", "max_num_batched_tokens"]
OPTIONS += ["quantization", "page_size", "kv_cache_memory", "seed", "revision", "nothing"]

SHORT = SamplingParams(max_tokens=4)
some = settings(max_examples=150)
few = settings(max_examples=60)  # that load a checkpoint each


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """One checkpoint, in three files."""
    folder = write_checkpoint(tmp_path_factory.mktemp("intact") / "checkpoint", vocab_size=300, shards=3)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def copied(intact):
    """copied() -> a fresh copy of it."""
    folder = intact.parent / "damaged"

    def copied():
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(intact, folder)

    return copied


def works_or_says_why(call, *errors):
    try:
        call()
    except errors as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 2000, text


def load_and_run(folder):
    with LLM(folder, device="cpu", max_num_seqs=2) as llm:
        llm.generate("hi" if llm.tokenizer else [1], SHORT, use_tqdm=False)


def put(node, where, value):
    """Replaces what is `where` in JSON: each number is a child's, counted round, and the walk ends at a leaf."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    key = keys[where[0] % len(keys)]
    if len(where) > 1 and isinstance(node[key], dict | list) and node[key]:
        put(node[key], where[1:], value)
    else:
        node[key] = value


@few
@given(
    name=st.sampled_from(
        ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "header"]
    ),
    where=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    value=st.sampled_from(JSON),
)
def test_a_value_of_a_checkpoint(copied, name, where, value):
    folder = copied()
    if name != "header":
        content = json.loads((folder / name).read_text())
        put(content, where, value)
        (folder / name).write_text(json.dumps(content))
    else:
        path = folder / "model-00002-of-00003.safetensors"
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        put(header, where, value)
        written = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + size :])
    works_or_says_why(lambda: load_and_run(folder), ValueError, FloatingPointError)


@few
@given(number=st.integers(0, 6), at=st.floats(0, 1), put_in=st.binary(max_size=9), take_out=st.integers(0, 9))
@example(number=0, at=0.0, put_in=b"[" * 100_000, take_out=0)
def test_bytes_of_a_checkpoint(copied, number, at, put_in, take_out):
    """Of a file of 10 KB nine bytes, or, from the headers of safetensors, half of them are its first 3 %."""
    path = sorted(copied().iterdir())[number]
    data = path.read_bytes()
    start = int(len(data) * at**4)
    path.write_bytes(data[:start] + put_in + data[start + take_out :])
    works_or_says_why(lambda: load_and_run(path.parent), ValueError, FloatingPointError)


@some
@given(options=st.dictionaries(st.sampled_from(SAMPLING), st.sampled_from(OBJECTS), min_size=1, max_size=2))
def test_params(shared_llm, options):
    works_or_says_why(
        lambda: shared_llm.generate([1], SamplingParams(**options), use_tqdm=False), ValueError, TypeError
    )


@some
@given(options=st.dictionaries(st.sampled_from(OPTIONS), st.sampled_from(OBJECTS), min_size=1, max_size=2))
def test_options(intact, options):
    works_or_says_why(lambda: LLM(intact, **{"device": "cpu"} | options).close(), ValueError, TypeError)


prompts = st.recursive(
    st.sampled_from(OBJECTS) | st.just([1, 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "prompt_token_ids"]), inner),
    max_leaves=4,
)
# what may be in a message but no template reads
messages = st.dictionaries(st.sampled_from(["role", "content", "x"]), st.sampled_from(OBJECTS) | st.just("hi"))


@some
@given(prompt=prompts, params=st.sampled_from(OBJECTS) | st.just(SHORT))
def test_calls(shared_llm, prompt, params):
    works_or_says_why(lambda: shared_llm.generate(prompt, params, use_tqdm=False), ValueError)
    assert not shared_llm.engine.has_unfinished()


@some
@given(conversation=st.lists(messages | st.sampled_from(OBJECTS), max_size=3))
def test_conversations(shared_llm, conversation):
    works_or_says_why(lambda: shared_llm.chat(conversation, SHORT, use_tqdm=False), ValueError)
