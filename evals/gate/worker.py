"""One side of the gate: a process that holds one checkout's engine and does one unit of work for every line it reads.

It is started as a file, not as a module, and takes `blockinfer` from the checkout that is its working directory. That
may be older than this file, so it calls `LLM`, `SamplingParams` and `generate` alone. Requests and replies are lines of
JSON on stdin and stdout; while the other side works this one waits on its pipe. It ends when stdin does.

BLOCKINFER_GATE_SLOWDOWN=0.1 makes every unit do a tenth more work, inside the timed part. It is there to try the gate.
"""

import gc
import hashlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SLOWDOWN = "BLOCKINFER_GATE_SLOWDOWN"


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    # what a library prints is no reply
    os.dup2(2, 1)
    try:
        side = Side(Path.cwd(), **json.loads(sys.stdin.readline()))
        print(json.dumps({}), file=replies)
        for line in sys.stdin:
            print(json.dumps(side.answer(**json.loads(line))), file=replies)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies)
        raise


class Side:
    """The engine of the checkout `root`, and the `conversations` that its units are about."""

    def __init__(self, root: Path, conversations: list[list[dict[str, str]]], batch_size: int) -> None:
        model = root / "evals" / "llada_tiny"
        if not model.is_dir():
            raise FileNotFoundError("this checkout has no evals/llada_tiny, the model that the gate runs")
        sys.path.insert(0, str(root))
        found = importlib.util.find_spec("blockinfer")
        if found is None or not Path(found.origin).parent.parent.samefile(root):
            raise ImportError(f"this checkout has no package blockinfer, and {found and found.origin} is not its own")
        import blockinfer

        self.make_params = blockinfer.SamplingParams
        self.llm = blockinfer.LLM(str(model), device="cpu", max_num_seqs=batch_size)
        self.slowdown = float(os.environ.get(SLOWDOWN, 0))
        tokenizer = self.llm.tokenizer
        texts = [
            tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            for conversation in conversations
        ]
        # every side reads the same questions through its own checkpoint's tokenizer
        self.prompts = [{"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)} for text in texts]
        # a collection before every unit would otherwise go through all that torch and transformers hold, for 0.1 s
        gc.freeze()

    def answer(self, params: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        """One unit: the rows of these numbers, all at once. -> seconds on the clock and of CPU, tokens, forwards summed
        over the requests, and a hash of each answer's token ids; or why this checkout does not take the params."""
        try:
            params = self.make_params(**params)
        except (TypeError, ValueError) as error:
            return {"unsupported": str(error)}
        prompts = [self.prompts[row] for row in rows]
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        if self.slowdown:
            repeat_work(self.slowdown * (time.process_time() - cpu))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        answers = [output.outputs[0].token_ids for output in outputs]
        return {
            "wall": wall,
            "cpu": cpu,
            "tokens": sum(map(len, answers)),
            "nfe": sum(output.metrics.nfe for output in outputs),
            "answers": [hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16] for ids in answers],
        }


def repeat_work(cpu_seconds: float) -> None:
    """Multiplies matrices of the small model's size until this process has used so many more seconds of CPU."""
    import torch

    end = time.process_time() + cpu_seconds
    a, b = torch.ones(32, 256), torch.ones(256, 640)
    while time.process_time() < end:
        a @ b


if __name__ == "__main__":
    main()
