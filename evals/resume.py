"""Generations kept in a file as they come, so that the same command goes on where a killed run stopped."""

import dataclasses
import fcntl
import hashlib
import json
from array import array
from collections import defaultdict
from pathlib import Path

import torch

import blockinfer
from blockinfer import LLM, RequestOutput, SamplingParams
from blockinfer.outputs import CompletionOutput, RequestMetrics

_START = b'{"key": "'


class Generations:
    """The file of `--resume`: a line per finished request, of any settings, with the key of what decided it."""

    def __init__(self, path: str | Path) -> None:
        """Reads `path`, made where it is missing; a last line that a kill has cut short is taken out of it.

        Raises ValueError for a file that cannot be written, that another run is writing, or that holds anything else.
        """
        try:
            self._file = open(path, "a+b")
        except OSError as error:
            raise ValueError(f"--resume {path}: {error.strerror}") from error
        try:
            self._found = self._read()
        except ValueError as error:
            self._file.close()
            raise ValueError(f"--resume {path}: {error}") from None

    def _read(self) -> dict[str, list[tuple[CompletionOutput, RequestMetrics]]]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another run is writing to it; wait for its end") from None
        except OSError:
            # some network file systems have no locks; lines are then appended without one
            pass
        self._file.seek(0)
        content = self._file.read()
        *lines, rest = content.split(b"\n")
        cut_short = _START.startswith(rest[: len(_START)])
        if not cut_short:
            lines.append(rest)
        found = defaultdict(list)
        for number, line in enumerate(lines, 1):
            try:
                fields = json.loads(line)
                generation = CompletionOutput(**fields["completion"]), RequestMetrics(**fields["metrics"])
                found[fields["key"]].append(generation)
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"line {number} is no generation that the suite wrote") from None
        if cut_short:
            self._file.truncate(len(content) - len(rest))
        return found

    def __enter__(self) -> "Generations":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def take(self, settings: bytes, prompt_token_ids: list[int]) -> RequestOutput | None:
        """A generation with these settings from this prompt, each once; None where there is none (any more)."""
        same = self._found[_key(settings, prompt_token_ids)]
        if not same:
            return None
        completion, metrics = same.pop(0)
        return RequestOutput(-1, None, prompt_token_ids, [completion], True, metrics)

    @property
    def num_left(self) -> int:
        """Generations that were not taken: of other settings or other rows."""
        return sum(len(same) for same in self._found.values())

    def append(self, settings: bytes, output: RequestOutput) -> None:
        """The line survives the end of the process, not that of the machine."""
        key = _key(settings, output.prompt_token_ids)
        line = {"key": key, "completion": vars(output.outputs[0]), "metrics": vars(output.metrics)}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


def _key(settings: bytes, prompt_token_ids: list[int]) -> str:
    return hashlib.sha256(settings + array("q", prompt_token_ids).tobytes()).hexdigest()


def settings_hash(model: str, params: SamplingParams) -> bytes:
    """Of the model with this fingerprint, decoding with these params."""
    return hashlib.sha256(json.dumps([model, dataclasses.asdict(params)]).encode()).digest()


def fingerprint(llm: LLM) -> str:
    """A hash of all that decides a generation besides params and prompt: weights, shape, special tokens, number format,
    device and the engine's code. Batch size and threads are left out: they change how sums round, and no more."""
    gpu = torch.cuda.get_device_name(llm.config.device) if llm.config.device.type == "cuda" else None
    about = [llm.model_config, llm.config.mask_token_id, sorted(llm.engine.stop_token_ids), llm.config.dtype, gpu]
    digest = hashlib.sha256(repr([about, torch.__version__, torch.version.cuda]).encode())
    for path in sorted(Path(blockinfer.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for name, weight in llm.engine.model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
