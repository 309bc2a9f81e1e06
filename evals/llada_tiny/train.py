"""Train the tiny LLaDA and write it in the published checkpoint format.

python -m evals train-tiny --out evals/llada_tiny          # one H100; README.md says how long
python -m evals train-tiny --out /tmp/tiny --minutes 8     # the schedule shortened where the steps take longer
python -m evals train-tiny --out /tmp/tiny --smoke         # the whole path on a CPU within a minute

Beside the weights, training.jsonl gets a line every some hundred steps: seconds, loss, share of masked content
predicted right by source, shares of two-hop questions whose first and second fact are found (evaluate.lookups), and of
four-choice questions whose letter is (evaluate.letters).

Every minute, and when SIGTERM ends it, the weights so far are exported and the training's state is written to state.pt:
the same command continues from there, and the minutes before count. At the end that file is removed.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from queue import Empty

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.files import BadOutput, check_folder, number_argument, path_argument
from evals.llada_tiny import data
from evals.llada_tiny.data import ROW, Batch, Encoder, make_batch
from evals.llada_tiny.evaluate import QUICK, heldout_rows, report
from evals.llada_tiny.init import initialise
from evals.llada_tiny.model import Shape, TinyLLaDA, attention_bias, export
from evals.llada_tiny.muon import Muon
from evals.llada_tiny.progress import Log, State
from evals.llada_tiny.tokenizer import BOS, save_tokenizer, train_tokenizer

# a slow warm-up: a fast one overwrites what init.py lays down before it is of use
FULL = {"steps": 32_000, "rows": 128, "warm_up": 1_000, "log_every": 250, "eval_rows": 100, "shape": {}}
SMOKE = {
    "steps": 6,
    "rows": 4,
    "warm_up": 2,
    "log_every": 2,
    "eval_rows": 1,
    "shape": {"d_model": 64, "n_layers": 2, "n_heads": 1, "mlp_hidden_size": 128},
}
LEARNING_RATES = (3e-3, 1e-3)  # of Muon and of Adam
CURRICULUM = (0.05, 0.35)  # shares of the training at which problems begin to widen and are at their full width
# the other options that determine the weights: written to the log, and fixed when a training continues
RECIPE = data.RECIPE | {"learning_rates": LEARNING_RATES, "curriculum": CURRICULUM}


def level_at(share: float) -> float:
    """The problems' difficulty at this share of the training, 0 to 1."""
    first, last = CURRICULUM
    return min(1.0, max(0.0, (share - first) / (last - first)))


def rate_at(step: int, share: float, warm_up: int) -> float:
    """Warm up, hold to 35 % of the training, when problems reach full difficulty, then fall linearly to zero."""
    return min(1.0, (step + 1) / warm_up) * min(1.0, (1 - share) / (1 - CURRICULUM[1]))


def _worker(first: int, stride: int, tokenizer: str, queue: multiprocessing.Queue, options: dict) -> None:
    # sent to the whole group, the signal would leave half a batch in the pipe, and the main process waiting for ever
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallelism comes from the workers
    torch.set_num_threads(1)
    encoder = Encoder(tokenizer)
    for number in range(first, options["steps"], stride):
        level = level_at(number / options["steps"])
        queue.put(make_batch(encoder, number, options["rows"], level, options["seed"]))


def batches(tokenizer: str, options: dict, workers: int, first: int = 0) -> Iterator[Batch]:
    """The run's batches in order from number `first` on; worker w makes every `workers`-th one. To be closed.

    Raises RuntimeError if a worker has died.
    """
    context = multiprocessing.get_context("fork")
    queues = [context.Queue(maxsize=4) for _ in range(workers)]
    processes = [
        context.Process(target=_worker, args=(first + w, workers, tokenizer, queues[w], options), daemon=True)
        for w in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        for number in range(first, options["steps"]):
            worker = (number - first) % workers
            yield _get(queues[worker], processes[worker], number)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _get(queue: multiprocessing.Queue, process: multiprocessing.Process, number: int) -> Batch:
    while True:
        try:
            return queue.get(timeout=1)
        except Empty:
            if not process.is_alive():
                raise RuntimeError(
                    f"the process that makes batch {number} died with exit code {process.exitcode}; the same command "
                    "goes on from state.pt"
                ) from None


class Objective(nn.Module):
    """LLaDA's loss: cross-entropy of the masked places, each weighted 1/t."""

    def __init__(self, model: TinyLLaDA) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        bias = attention_bias(batch["documents"], batch["segments"]).to(
            torch.bfloat16 if batch["tokens"].is_cuda else torch.float32
        )
        hidden = self.model.hidden(batch["tokens"], batch["positions"], bias)
        logits = self.model.logits(hidden.flatten(0, 1)[batch["loss_at"]]).float()
        loss = F.cross_entropy(logits, batch["targets"], reduction="none")
        return (loss * batch["loss_weight"]).sum(), logits.argmax(-1) == batch["targets"]


def optimizers(model: TinyLLaDA) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, Adam for embeddings and norms; their rates are tensors, to be filled."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "wte" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "wte" in name]
    device = others[0].device
    on_gpu = {"fused": True, "capturable": True} if device.type == "cuda" else {}
    rates = [torch.zeros((), device=device) for _ in range(2)]
    return [Muon(matrices, rates[0]), torch.optim.AdamW(others, rates[1], (0.9, 0.98), weight_decay=0.0, **on_gpu)]


class Step:
    """One step of the training, as a CUDA graph from the fourth on if there is a GPU.

    The host takes longer to launch a step's kernels one by one than an H100 to run them. All run on the current stream,
    which must not be the default one.
    """

    def __init__(
        self, model: TinyLLaDA, average: list[Tensor], steppers: list[torch.optim.Optimizer], log: Log
    ) -> None:
        self.weights, self.average, self.steppers, self.log = list(model.parameters()), average, steppers, log
        self.device = self.weights[0].device
        self.objective: nn.Module = Objective(model)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            self.objective = torch.compile(self.objective)
        self.arrays: dict[str, Tensor] = {}
        self.following = torch.zeros((), device=self.device)  # how far the average moves towards the weights
        self.eager, self.graph = 3, None

    def __call__(self, batch: Batch, rates: tuple[float, ...], following: float) -> None:
        for name, array in vars(batch).items():
            tensor = torch.from_numpy(array)
            if name not in self.arrays:
                self.arrays[name] = torch.empty_like(tensor, device=self.device)
            tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
            self.arrays[name].copy_(tensor, non_blocking=True)
        for stepper, rate in zip(self.steppers, rates, strict=True):
            for group in stepper.param_groups:
                group["lr"].fill_(rate)
        self.following.fill_(following)
        if self.device.type == "cuda" and self.eager == 0:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                    self._run()
            self.graph.replay()
        else:
            self.eager -= 1
            self._run()
            for stepper in self.steppers:
                stepper.zero_grad(set_to_none=True)

    def _run(self) -> None:
        arrays = {name: x if x.is_floating_point() else x.long() for name, x in self.arrays.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, right = self.objective(arrays)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for stepper in self.steppers:
            stepper.step()
        with torch.no_grad():
            apart = torch._foreach_sub(self.weights, self.average)
            torch._foreach_mul_(apart, self.following)
            torch._foreach_add_(self.average, apart)
        self.log.add(loss.detach(), right, arrays["loss_source"])


def train(
    model: TinyLLaDA, encoder: Encoder, path: str, options: dict, kept: State, state: dict | None, started: float
) -> None:
    """Run all steps, or as many as fit into options["minutes"], from where an earlier training was interrupted, in
    `state`.

    The model ends with the average of its weights.
    """
    torch.manual_seed(options["seed"])
    weights = list(model.parameters())
    device = weights[0].device.type
    average = [w.detach().clone() for w in weights]
    steppers = optimizers(model)
    done, out = 0, kept.path.parent
    log = Log(encoder, out, device, started, options)
    if state is not None:
        done = state["done"]
        model.load_state_dict(state["weights"])
        average = state["average"]
        for stepper, its_state in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(its_state)
        log.go_on(state["sums"], state["lines"])
        print(f"going on after {done} steps and {state['seconds']:.0f} s", flush=True)
    run = Step(model, average, steppers, log)
    saved = time.time()
    with closing(batches(path, options, options["workers"], done)) as made:
        for step, batch in enumerate(made, done):
            share = step / options["steps"]
            if options["minutes"]:
                share = max(share, (time.time() - started) / 60 / options["minutes"])
            if share >= 1:
                break
            factor = rate_at(step, share, options["warm_up"])
            run(batch, tuple(rate * factor for rate in LEARNING_RATES), 1 - min(0.999, step / (step + 10)))
            done = step + 1
            if done % options["log_every"] == 0:
                log.write(done, model)
            if kept.ends or time.time() - saved > kept.every:
                saved = time.time()
                kept.write(done, saved - started, model, average, steppers, log)
                _export_average(model, average, out)
            if kept.ends:
                sys.exit(f"ended after {done} steps by SIGTERM; the same command goes on from there")
    with torch.no_grad():
        for w, mean in zip(weights, average, strict=True):
            w.copy_(mean)
    print(f"trained {done} steps in {(time.time() - started) / 60:.1f} minutes", flush=True)


def _export_average(model: TinyLLaDA, average: list[Tensor], out: Path) -> None:
    kept = [w.detach().clone() for w in model.parameters()]
    with torch.no_grad():
        for w, mean in zip(model.parameters(), average, strict=True):
            w.copy_(mean)
        export(model, out)
        for w, old in zip(model.parameters(), kept, strict=True):
            w.copy_(old)


def new_shape(encoder: Encoder, sizes: dict[str, int]) -> Shape:
    return Shape(
        vocab_size=encoder.tokenizer.get_vocab_size(),
        bos_token_id=encoder.tokenizer.token_to_id(BOS),
        eos_token_id=encoder.eos,
        mask_token_id=encoder.mask,
        **sizes,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m evals train-tiny", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder for config, tokenizer and weights")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a smaller model")
    parser.add_argument("--steps", type=number_argument(1), help=f"optimizer steps (default {FULL['steps']})")
    parser.add_argument(
        "--rows", type=number_argument(1), help=f"packed rows of {ROW} tokens a step (default {FULL['rows']})"
    )
    limit = "end by then, with the learning rate at zero (default: no limit)"
    parser.add_argument("--minutes", type=number_argument(0.1, float), help=limit)
    parser.add_argument("--seed", type=int, default=0, help="of weights and problems (0)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    started = time.time()
    options = dict(SMOKE if args.smoke else FULL)
    options |= {"recipe": RECIPE, "seed": args.seed, "minutes": args.minutes}
    options["workers"] = max(1, multiprocessing.cpu_count() - 1)
    options |= {name: value for name in ("steps", "rows") if (value := getattr(args, name))}
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    try:
        check_folder(args.out)
    except BadOutput as error:
        parser.error(f"--out: {error}")
    kept = State(args.out, options, every=0 if args.smoke else 60)
    try:
        state = kept.read(device)
    except ValueError as error:
        parser.error(str(error))
    if state is None:
        save_tokenizer(train_tokenizer(2_000 if args.smoke else 60_000, args.seed), args.out)
    else:
        started -= state["seconds"]
    path = str(args.out / "tokenizer.json")
    encoder = Encoder(path)
    torch.manual_seed(args.seed)
    model = TinyLLaDA(new_shape(encoder, options["shape"]))
    initialise(model, torch.Generator().manual_seed(args.seed))
    model.to(device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f}M parameters on {device}; {options['rows'] * ROW} tokens a step; {options}", flush=True)
    if device == "cuda":
        torch.set_num_threads(1)  # more threads would wait for each other beside as many workers as there are cores
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are not captured on the default one
    with kept.sigterm():
        train(model, encoder, path, options, kept, state, started)
    export(model, args.out)
    kept.remove()
    model.load_state_dict({name: w.bfloat16().float() for name, w in model.state_dict().items()})  # what was exported
    report(model, encoder, heldout_rows(options["eval_rows"], "validation"), QUICK)
