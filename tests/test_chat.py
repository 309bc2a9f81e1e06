"""Chat templates: what transformers renders, and an end to those that fail, loop or fill the memory."""

import gc
import json
import os

import pytest

from blockinfer import LLM, SamplingParams
from blockinfer.chat import ChatTemplate
from tests.checkpoints import CHAT_TEMPLATE

SHORT = SamplingParams(max_tokens=4)
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi "}]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set s = namespace(x='x') %}{% for i in range(99) %}{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}"


@pytest.fixture(scope="module")
def renderer(shared_llm):
    template = ChatTemplate(shared_llm.tokenizer)
    template.cpu_seconds = 1
    yield template
    template.close()


@pytest.fixture
def use(renderer, monkeypatch):
    """use(template) -> a ChatTemplate of it."""

    def use(template):
        monkeypatch.setattr(renderer._tokenizer, "chat_template", template)
        return renderer

    return use


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{{ messages | tojson }} {{ eos_token }}",
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% if loop.first %}{% break %}{% endif %}{% endfor %}",
        "{% generation %}{{ messages[0]['content'][::-1] }}{% endgeneration %}",
        "  {% if add_generation_prompt %}\n x \n{% endif %} {{ strftime_now('%Y') }}",
        {"default": "{{ messages | length }}", "tool_use": "{{ 1 / 0 }}"},
    ],
)
def test_what_transformers_renders(use, template):
    ours = use(template)
    theirs = ours._tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert ours.render(ASKED) == theirs


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "fails: TemplateSyntaxError: "),
        ("{{ a.b }}", "fails: UndefinedError: 'a' is undefined"),
        ("{{ messages[9].role }}", "fails: UndefinedError: list object has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "fails: SecurityError: access to attribute '__class__'"),
        ("{{ messages.clear() }}", "fails: SecurityError: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails: RecursionError: "),
        ("{% if 1 %}" * 2000 + "x" + "{% endif %}" * 2000, "fails: RecursionError: "),
        ("{{ raise_exception('roles must alternate') }}", "fails: TemplateError: roles must alternate"),
        ("{{ raise_exception('line\\n' * 200) }}", "fails: TemplateError: (line )+li"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: "),
        ("{{ 1 + 'a' }}", "fails: TypeError: "),
        ("{{ 'x' | nothing }}", "fails: TemplateAssertionError: No filter named 'nothing'"),
        ("{% include '/etc/passwd' %}", "fails: TypeError: no loader"),
        ("{{ missing }}", "makes an empty prompt of it"),
        (" \n", "makes an empty prompt of it"),
        (5, "is no text"),
        ({"other": "x"}, "multiple chat templates with no default"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails: OverflowError: Range too big"),
        (NESTED, "fails: it took more than 1 s of CPU time"),
        ("{{ 7 ** (7 ** 9) % 5 }}", "fails: it took more than 1 s of CPU time"),
        ("{{ 'x' * 10 ** 11 }}", "fails: it needs more than 512 MiB of memory"),
        ("{{ '%099999999999d' % 1 }}", "fails: it needs more than 512 MiB of memory"),
        (DOUBLED, "fails: it needs more than 512 MiB of memory"),
        ("{{ 'x' * 10 ** 8 }}{{ '\\x01' * 10 ** 8 }}", "fails: it needs more than 512 MiB of memory"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_template_that_fails(use, template, message):
    with pytest.raises(ValueError, match=message):
        use(template).render(ASKED)
    assert use("{{ messages[1].content }}").render(ASKED) == " hi "


@pytest.mark.parametrize("extra", [{"x": object()}, {"x": {1, 2}}, {(1,): "x"}])
def test_messages_that_are_no_json(llm, extra):
    with pytest.raises(ValueError, match="conversation 1: its messages hold a value that JSON does not have"):
        llm.chat([ASKED, [{"role": "user", "content": "hi"} | extra]], SHORT, use_tqdm=False)


def test_the_conversation_is_named_and_a_prompt_too_long_is_not_tokenized(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ messages[0].content * 10 ** 7 }}")
    with pytest.raises(
        ValueError, match="conversation 0: the prompt's 20000000 characters cannot fit max_model_len=256"
    ):
        llm.chat([{"role": "user", "content": "hi"}], SHORT, use_tqdm=False)
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ messages[1].content }}")
    with pytest.raises(ValueError, match="conversation 1: the chat template of .* fails: UndefinedError"):
        llm.chat([ASKED, ASKED[:1]], SHORT, use_tqdm=False)


def test_an_interrupt_leaves_no_answer_for_the_next_conversation(use, monkeypatch):
    ours = use("{{ messages[0].content }}")

    def interrupted(line):
        answer = ask(line + "\n" + line)  # two answers, of which one is read
        assert json.loads(answer) == {"text": "first"}
        raise KeyboardInterrupt

    ask = ours._ask
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ours, "_ask", interrupted)
        ours.render([{"role": "user", "content": "first"}])
    assert ours.render([{"role": "user", "content": "second"}]) == "second"


def test_one_process_serves_all_and_ends_with_the_llm(checkpoint):
    with LLM(checkpoint, device="cpu") as llm:
        llm.chat(ASKED, SHORT, use_tqdm=False)
        process = llm._chat_template._process
        llm.chat([ASKED, ASKED], SHORT, use_tqdm=False)
        assert llm._chat_template._process is process
    assert process.poll() is not None
    llm = LLM(checkpoint, device="cpu")
    llm.chat(ASKED, SHORT, use_tqdm=False)
    pid = llm._chat_template._process.pid
    del llm
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
