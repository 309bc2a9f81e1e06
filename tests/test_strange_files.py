"""Names that lead out of a checkpoint's folder, and what stands in it without being a file to read."""

import json
import os

import pytest

from blockinfer import LLM
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ".", "..", "", "x/", None, 5, "a" * 300, "a\0b"])
def test_an_index_that_names_no_file_of_its_folder(tmp_path, name):
    """The file that it points to would do."""
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3)
    (tmp_path / "x").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001-of-00003.safetensors"', json.dumps(name)))
    with pytest.raises(ValueError, match="wte.weight' is in .*, which is no plain file name"):
        LLM(folder, device="cpu")


def test_links_like_those_of_the_hub_s_cache(tmp_path):
    (tmp_path / "snapshot").mkdir()
    for path in write_checkpoint(tmp_path / "blobs", shards=3).iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    with LLM(tmp_path / "snapshot", device="cpu") as llm:
        assert llm.generate([1, 2], use_tqdm=False)


STRANGE = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("put", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"]
)
def test_what_is_no_file(checkpoint, tmp_path, name, put):
    for path in checkpoint.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    put(tmp_path / name)
    with pytest.raises(
        ValueError, match=f"{name}: a file is expected, and this is a (folder|broken link, a pipe or a dev)"
    ):
        LLM(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_what_may_not_be_read(checkpoint, monkeypatch, name):
    """safetensors itself says of such a file that it is not there."""
    monkeypatch.setattr("os.access", lambda path, mode: path.name != name)
    with pytest.raises(ValueError, match=f"{name}: cannot be read: this user may not"):
        LLM(checkpoint, device="cpu")
