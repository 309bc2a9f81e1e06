"""One side of the gate: a process that holds one checkout's engine and answers every line that it reads.

It is started as a file, not as a module, and takes `blockinfer` from the checkout that is its working directory. That
may be older than this file, so it calls only `LLM`, `SamplingParams` and `generate`. Requests and replies are lines of
JSON on stdin and stdout; while the other side works this one waits on its pipe. It ends when stdin does.
"""

import gc
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    # a library's output is not a reply
    os.dup2(2, 1)
    try:
        side = Side(Path.cwd(), **json.loads(sys.stdin.readline()))
        print(json.dumps({}), file=replies)
        for line in sys.stdin:
            request = json.loads(line)
            answer = {"unit": side.unit, "peak": side.peak, "held": side.held}[request.pop("call")]
            print(json.dumps(answer(**request)), file=replies)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies)
        raise


class Side:
    """The engine of the checkout `root`, and the `conversations` that its units answer."""

    def __init__(self, root: Path, conversations: list[list[dict[str, str]]], batch_size: int) -> None:
        model = root / "evals" / "llada_tiny"
        if not model.is_dir():
            raise FileNotFoundError("this checkout has no evals/llada_tiny, the model that the gate runs")
        sys.path.insert(0, str(root))
        found = importlib.util.find_spec("blockinfer")
        if found is None or not found.origin or not Path(found.origin).parent.parent.samefile(root):
            raise ImportError(f"this checkout has no package blockinfer, and {found and found.origin} is not its own")
        import blockinfer

        self.make_params = blockinfer.SamplingParams
        self.llm = blockinfer.LLM(str(model), device="cpu", max_num_seqs=batch_size)
        refuse_foreign_modules(root)
        tokenizer = self.llm.tokenizer
        texts = [
            tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            for conversation in conversations
        ]
        # every side encodes the same questions with its own checkpoint's tokenizer
        self.prompts = [{"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)} for text in texts]
        # otherwise a collection before every unit would scan all that torch and transformers hold, in 0.1 s
        gc.freeze()

    def unit(self, params: dict[str, Any], rows: list[int], more_work: float = 0.0) -> dict[str, Any]:
        """Answers the rows of these numbers, all at once. -> wall and CPU seconds, tokens, forwards summed over the
        requests, and a hash of each answer's token ids; or why this checkout does not take the params.

        more_work: the share of its CPU time by which the unit does more, inside the timed part, to test the gate.
        """
        try:
            params = self.make_params(**params)
        except (TypeError, ValueError) as error:
            return {"unsupported": str(error)}
        prompts = [self.prompts[row] for row in rows]
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        if more_work:
            repeat_work(more_work * (time.process_time() - cpu))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        answers = [output.outputs[0].token_ids for output in outputs]
        return {
            "wall": wall,
            "cpu": cpu,
            "tokens": sum(map(len, answers)),
            "nfe": sum(output.metrics.nfe for output in outputs),
            "answers": [hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16] for ids in answers],
        }

    def peak(self, params: dict[str, Any], rows: list[int], more_memory: float = 0.0) -> dict[str, int]:
        """The most bytes of tensors that a unit allocates, beyond those from before it. Not timed.

        more_memory: the share by which it takes more, to test the gate.
        """
        peak = self._peak(params, rows, 0)
        return {"bytes": self._peak(params, rows, int(more_memory * peak)) if more_memory else peak}

    def _peak(self, params: dict[str, Any], rows: list[int], beside: int) -> int:
        import torch
        from torch.autograd.profiler import profile

        # torch.profiler would load torch's compiler, which makes a folder beside those of temporary files
        with profile(profile_memory=True) as profiler:
            # kept until the unit ends
            extra = torch.empty(beside, dtype=torch.uint8)
            self.unit(params, rows)
            del extra
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            profiler.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_bytes())["traceEvents"]
        changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
        held = peak = 0
        for _, change in sorted(changes, key=lambda at: at[0]):
            held += change
            peak = max(peak, held)
        return peak

    def held(self, more_memory: float = 0.0) -> dict[str, int]:
        """The bytes of all tensors that this process holds: weights, the KV cache, and what units left behind."""
        import torch

        held = self._held()
        extra = torch.empty(int(more_memory * held), dtype=torch.uint8)
        return {"bytes": self._held() if len(extra) else held}

    def _held(self) -> int:
        import torch

        gc.unfreeze()
        gc.collect()
        # type(), as isinstance would ask lazy modules for their classes
        tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
        storages = {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)}
        gc.freeze()
        return sum(storages.values())


def refuse_foreign_modules(root: Path) -> None:
    """Raises ImportError for a module of `blockinfer` that this checkout lacks and an editable install has supplied."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.startswith("blockinfer.") and file and not Path(file).resolve().is_relative_to(root.resolve()):
            raise ImportError(f"this checkout has no module {name}, and {file} is not its own")


def repeat_work(cpu_seconds: float) -> None:
    """Multiplies matrices of the small model's size until this process has used this many more CPU seconds."""
    import torch

    end = time.process_time() + cpu_seconds
    a, b = torch.ones(32, 256), torch.ones(256, 640)
    while time.process_time() < end:
        a @ b


if __name__ == "__main__":
    main()
