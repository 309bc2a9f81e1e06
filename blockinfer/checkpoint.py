"""A checkpoint's folder, config and tokenizer: found or downloaded, and read."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from blockinfer.checks import foreign_errors, nearest, reason, shown
from blockinfer.config import EngineConfig
from blockinfer.files import is_file, is_plain_name, read_json
from blockinfer.model_config import ConfigReader, check_embedded
from blockinfer.models.registry import SHAPES


def read_config(config: EngineConfig) -> tuple[Path | None, dict[str, Any], str]:
    """-> the checkpoint's folder (None for a shape known by name), its config.json, and a name for errors."""
    dummy = config.load_format == "dummy"
    if dummy and config.model in SHAPES:
        if config.revision is not None:
            raise ValueError(f"revision={shown(config.revision)} is for a Hub name, and {config.model!r} is a shape")
        return None, SHAPES[config.model], str(config.model)
    if config.model in SHAPES and not _is_folder("checkpoint", config.model):
        raise ValueError(f"{config.model!r} is a shape's name, for random weights: pass load_format='dummy' with it")
    files = ["config.json"] if dummy else ["*.json", "*.safetensors", "*.jinja"]
    folder = _fetch("checkpoint", config.model, config.revision, files)
    path = folder / "config.json"
    if not is_file(path):
        raise ValueError(f"{folder}: there is no config.json; a checkpoint in the Hugging Face format is expected")
    return folder, _object(path), str(path)


def read_end_token_ids(folder: Path, embeddings: int) -> tuple[int, ...]:
    """The eos_token_id of the checkpoint's generation_config.json, where fine-tunes name the ends of their turns.

    Raises ValueError for a damaged file, or for an id beyond the `embeddings` rows.
    """
    path = folder / "generation_config.json"
    if not is_file(path):
        return ()
    ids = ConfigReader(_object(path), str(path)).token_ids("eos_token_id")
    check_embedded(str(path), "eos_token_id", ids, embeddings)
    return ids


def load_tokenizer(config: EngineConfig, folder: Path | None, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer asked for, or the checkpoint's; None if there is none, as for dummy weights.

    Raises ValueError if it is damaged or has ids beyond vocab_size.
    """
    if config.tokenizer is not None:
        folder = _fetch("tokenizer", config.tokenizer, None, ["*.json", "*.jinja"])
        if not is_file(folder / "tokenizer.json"):
            raise ValueError(f"{folder}: there is no tokenizer.json; the fast tokenizer's file is expected")
    elif config.load_format == "dummy" or not is_file(folder / "tokenizer.json"):
        return None
    _check_tokenizer_files(folder)
    with foreign_errors(f"{folder}: the tokenizer cannot be loaded"):
        # LLaDA's class, named outright: AutoTokenizer would look the model type up, which transformers does not know
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        tokenizer.decode(tokenizer.encode("Of 12 words", verbose=False), skip_special_tokens=True)
    if max(len(tokenizer), largest + 1) > vocab_size:
        found = f"{len(tokenizer)} tokens" if len(tokenizer) > vocab_size else f"a token of id {largest}"
        raise ValueError(
            f"the tokenizer of {folder} has {found}, the model's vocab_size is only {vocab_size}: they do not belong "
            "together"
        )
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    """transformers skips what is not a file, does not name a file that it cannot read, and opens any path that another
    file names."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
        if not is_file(folder / name) or not name.endswith(".json"):
            continue
        others = _object(folder / name).get("fast_tokenizer_files", [])
        if not isinstance(others, list) or not all(map(is_plain_name, others)):
            raise ValueError(f"{folder / name}: fast_tokenizer_files must be plain file names, got {shown(others)}")


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, got {type(content).__name__}")
    return content


def _is_folder(what: str, name: str | os.PathLike[str]) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a folder without access, ~nobody
        raise ValueError(f"the {what} {shown(str(name))} cannot be looked for: {reason(error)}") from error


def _fetch(what: str, name: str | os.PathLike[str], revision: str | None, files: list[str]) -> Path:
    """A local folder as it is; any other name is looked up on the Hub. what: "checkpoint" or "tokenizer"."""
    if _is_folder(what, name):
        if revision is not None:
            raise ValueError(f"revision={shown(revision)} is for a Hub name, and {shown(str(name))} is a local folder")
        return Path(name).expanduser()
    path = Path(name).expanduser()
    if path.is_absolute() or os.path.lexists(path) or str(name).startswith("."):
        raise ValueError(f"the {what} {shown(str(name))} is no folder; a {what}'s folder or a Hub name is expected")
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
    except Exception as error:  # the Hub's client lets its HTTP library's own errors through
        message = (
            f"the {what} {shown(str(name))} is no local folder and could not be fetched from the Hub: {reason(error)}"
        )
        if what == "checkpoint":
            message += "; for random weights of a published shape pass load_format='dummy' with one of "
            message += f"{', '.join(SHAPES)}{nearest(str(name), SHAPES)}"
        raise ValueError(message) from error
