"""lm-eval's own clients, local-chat-completions and local-completions, as they are installed, without a network."""

import json

import pytest

from blockinfer import SamplingParams
from tests.serve.conftest import MODEL

for package in ("lm_eval", "aiohttp", "tenacity"):
    pytest.importorskip(package)

import lm_eval  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

# of other libraries, which lm-eval imports or leaves open
pytestmark = pytest.mark.filterwarnings("default")

QUESTIONS = ["2 + 3?", "Half of 8?", "Héllo €", "Which one?"]
UNTIL = ["\x04", "nowhere"]


@pytest.mark.parametrize(
    ("client", "path", "chat"),
    [
        ("local-chat-completions", "/v1/chat/completions", True),
        ("local-completions", "/v1/completions", False),
    ],
)
def test_lm_eval(serve, served_llm, tmp_path, monkeypatch, client, path, chat):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    # it asks pip, nvidia-smi and others
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    params = SamplingParams(max_tokens=24, stop=UNTIL, seed=1234)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ask = served_llm.chat if chat else served_llm.generate
    expected = [o.outputs[0].text for o in ask(conversations if chat else QUESTIONS, params, use_tqdm=False)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": q, "answer": "5"}) + "\n" for q in QUESTIONS), encoding="utf-8")
    task = ConfigurableTask(
        config={
            "task": "rows",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": UNTIL, "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        }
    )
    server = serve()
    results = lm_eval.simple_evaluate(
        model=client,
        model_args={
            "model": MODEL,
            "base_url": f"{server.url}{path}",
            "num_concurrent": 3,
            "max_retries": 1,
            "tokenizer_backend": None,
            "tokenized_requests": False,
        },
        tasks=[task],
        # of its own tasks it would read thousands of files
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["rows"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == expected
    assert results["results"]["rows"]["exact_match,none"] == 0
