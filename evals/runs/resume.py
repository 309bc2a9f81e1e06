"""Generations kept in a file as they come, so that the same command continues where a killed run stopped."""

import dataclasses
import hashlib
import json
import os
import sys
from array import array
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from pydantic_core import from_json

import blockinfer
from blockinfer import LLM, RequestOutput, SamplingParams
from blockinfer.outputs import CompletionOutput, RequestMetrics
from evals.files import BadOutput, check_target, locked, write_output

_START = b'{"key": "'
# and the row's id, which older lines lack: for readers only, lookups use the key
_FIELDS = {"key", "completion", "metrics", "sha256"}
# Some file systems fill up with these a line whose end a power cut has lost.
_FILL = b"\0 \t\r"


class Generations:
    """The file of `--resume`: a line per finished request, of any settings, with a key of everything that determined
    it, and a hash of the line's other fields, which exposes damaged values."""

    def __init__(self, path: str | Path) -> None:
        """Reads `path`, made if it is missing. Damaged lines are moved to a file beside it, except a last one that a
        kill has cut short; their requests are generated again.

        Raises ValueError for a file that cannot be written, that another run is writing, or that holds something else.
        """
        self.path = os.fspath(path)
        # the number of lines that could not be written, and why the last of them could not
        self.lost, self.reason = 0, ""
        self.damaged: list[int] = []
        try:
            self._file = locked(check_target(path))
            try:
                self._found = self._read()
            except BaseException:
                self._file.close()
                raise
        except BadOutput as error:
            raise ValueError(f"--resume: {error}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"--resume {path}: {getattr(error, 'strerror', None) or error}") from None

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        content = self._file.readall()
        *_, last = raw = content.split(b"\n")
        lines = {number: line.strip(_FILL) for number, line in enumerate(raw, 1) if line.strip(_FILL)}
        whole = {number: fields for number, line in lines.items() if (fields := _parsed(line)) is not None}
        end = len(content) - len(last)
        if len(raw) in whole:
            # except for its end
            end += len(last.rstrip(_FILL))
        elif len(raw) in lines and _START.startswith(lines[len(raw)][: len(_START)]):
            # it was being written
            del lines[len(raw)]
        self.damaged = [number for number in lines if number not in whole]
        if self.damaged and not any(line.startswith(_START) for line in lines.values()):
            raise ValueError(f"line {self.damaged[0]} is no generation that the suite wrote, and no other line is one")
        if self.damaged:
            self._set_aside(lines, whole)
        elif end < len(content) or len(raw) in whole:
            self._file.truncate(end)
            self._file.write(b"\n" * (len(raw) in whole))
        found = defaultdict(list)
        for fields in whole.values():
            found[fields["key"]].append(fields)
        return found

    def _set_aside(self, lines: dict[int, bytes], whole: dict[int, dict[str, Any]]) -> None:
        with open(check_target(f"{self.path}.damaged"), "ab") as file:
            file.write(b"".join(lines[number] + b"\n" for number in self.damaged))
            file.flush()
            os.fsync(file.fileno())
        write_output(self.path, b"".join(lines[number] + b"\n" for number in whole))
        # that name is now another file
        self._file.close()
        self._file = locked(check_target(self.path))

    def __enter__(self) -> "Generations":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def take(self, settings: bytes, prompt_token_ids: list[int]) -> RequestOutput | None:
        """A generation with these settings from this prompt, each once; None if there is none (left)."""
        same = self._found[_key(settings, prompt_token_ids)]
        if not same:
            return None
        fields = same.pop(0)
        completion, metrics = CompletionOutput(**fields["completion"]), RequestMetrics(**fields["metrics"])
        return RequestOutput(-1, None, prompt_token_ids, [completion], True, metrics)

    @property
    def num_left(self) -> int:
        """The number of generations that were not taken: of other settings or other rows."""
        return sum(len(same) for same in self._found.values())

    def append(self, settings: bytes, output: RequestOutput, row_id: str) -> None:
        """The line survives the end of the process, but not of the machine. One that cannot be written is counted as
        lost, and removed: the run does not need it."""
        key = _key(settings, output.prompt_token_ids)
        line = {"key": key, "id": row_id, "completion": vars(output.outputs[0]), "metrics": vars(output.metrics)}
        end = os.fstat(self._file.fileno()).st_size
        left = memoryview(json.dumps(line | {"sha256": _hash(line)}).encode() + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(end)
            self.lost, self.reason = self.lost + 1, error.strerror or str(error)
            if self.lost == 1:
                print(f"\nblockinfer: {self.told_lost()}", file=sys.stderr)

    def told_damaged(self) -> str:
        numbers = ", ".join(map(str, self.damaged[:9])) + ", ..." * (len(self.damaged) > 9)
        lines = f"line {numbers} was" if len(self.damaged) == 1 else f"{len(self.damaged)} lines ({numbers}) were"
        return f"{lines} damaged: moved to {self.path}.damaged, to be generated again"

    def told_lost(self) -> str:
        """What to do about lines that could not be written."""
        number = f"{self.lost} generation{'s' * (self.lost > 1)}"
        return f"--resume {self.path}: {number} could not be kept: {self.reason}. The same command would make them anew"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """What `append` wrote; None for anything else."""
    try:
        fields = from_json(line)
    except ValueError:
        return None
    if not isinstance(fields, dict) or fields.keys() - {"id"} != _FIELDS:
        return None
    return fields if fields.pop("sha256") == _hash(fields) else None


def _hash(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _key(settings: bytes, prompt_token_ids: list[int]) -> str:
    return hashlib.sha256(settings + array("q", prompt_token_ids).tobytes()).hexdigest()


def settings_hash(model: str, params: SamplingParams) -> bytes:
    """Of the model with this fingerprint, decoding with these params."""
    return hashlib.sha256(json.dumps([model, dataclasses.asdict(params)]).encode()).digest()


def fingerprint(llm: LLM) -> str:
    """A hash of everything besides params and prompt that determines a generation: weights, shape, special tokens,
    number format, device and the engine's code. Batch size and threads are left out: they only change how sums
    round."""
    gpu = torch.cuda.get_device_name(llm.config.device) if llm.config.device.type == "cuda" else None
    about = [llm.model_config, llm.config.mask_token_id, sorted(llm.engine.stop_token_ids), llm.config.dtype, gpu]
    digest = hashlib.sha256(repr([about, torch.__version__, torch.version.cuda]).encode())
    for path in sorted(Path(blockinfer.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for name, weight in llm.engine.model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
