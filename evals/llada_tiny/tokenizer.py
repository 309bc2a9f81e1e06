"""The tokenizer: byte-level BPE with single digits, learnt on the generators' own text, in LLaDA's format.

python -m evals tokenizer-tiny --out evals/llada_tiny
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from evals.files import BadOutput, check_folder, path_argument, replacing, write_output
from evals.llada_tiny.problems import SOURCES, problem
from evals.questions.prompts import messages

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER, HEADER_END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL = (BOS, EOS, MASK, HEADER, HEADER_END, EOT)
VOCAB_SIZE = 2048  # with the special tokens; the embedding has as many rows

# The same layout as LLaDA's: each message between headers, its text trimmed, then the assistant's header.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def chat_text(row: dict) -> str:
    """What the chat template makes of a row, with the assistant's header (a test holds the two together)."""
    turns = (f"{HEADER}{m['role']}{HEADER_END}\n\n{m['content'].strip()}{EOT}" for m in messages(row))
    return f"{BOS}{''.join(turns)}{HEADER}assistant{HEADER_END}\n\n"


def texts(count: int, seed: int) -> Iterator[str]:
    """The training split's questions and solutions, the sources in turn."""
    rng = random.Random(seed)
    for i in range(count):
        row = problem(SOURCES[i % len(SOURCES)], rng, "train")
        yield messages(row)[0]["content"]
        yield row["solution"]


def train_tokenizer(count: int = 60_000, seed: int = 0) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    letters = pre_tokenizers.Split(
        Regex(r"(?<![A-Za-z])[A-D](?=\.)"), "isolated"
    )  # "A" on a line's start and after a space
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([letters, digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=10,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(count, seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template."""
    with replacing(folder / "tokenizer.json") as part:
        tokenizer.save(part)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": [HEADER, HEADER_END, EOT, MASK],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    write_output(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_output(folder / "chat_template.jinja", CHAT_TEMPLATE)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m evals tokenizer-tiny", description=__doc__)
    parser.add_argument("--out", type=path_argument, required=True, help="the folder to write to")
    folder = parser.parse_args(argv).out
    try:
        check_folder(folder)
    except BadOutput as error:
        parser.error(f"--out: {error}")
    save_tokenizer(train_tokenizer(), folder)
