"""Train the tiny LLaDA and write it in the published checkpoint format.

python -m evals.llada_tiny.train --out evals/llada_tiny          # one H200; README.md says how long
python -m evals.llada_tiny.train --out /tmp/tiny --smoke         # the whole path on a CPU within a minute
"""

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.llada_tiny.data import ROW, Batch, Encoder, make_batch
from evals.llada_tiny.evaluate import heldout_rows, report
from evals.llada_tiny.model import Shape, TinyLLaDA, attention_bias, export
from evals.llada_tiny.problems import SOURCES
from evals.llada_tiny.tokenizer import BOS, save_tokenizer, train_tokenizer

FULL = {"steps": 26_000, "rows": 192, "log_every": 500, "eval_rows": 250, "shape": {}}
SMOKE = {
    "steps": 6,
    "rows": 4,
    "log_every": 2,
    "eval_rows": 1,
    "shape": {"d_model": 64, "n_layers": 2, "n_heads": 1, "mlp_hidden_size": 128},
}
LEARNING_RATE = 3e-3
CURRICULUM = (0.03, 0.2)  # shares of the training at which problems begin to widen and are at their full width


def level_at(share: float) -> float:
    """The problems' width at this share of the training, 0 to 1."""
    first, last = CURRICULUM
    return min(1.0, max(0.0, (share - first) / (last - first)))


def rate_at(step: int, steps: int) -> float:
    """Warm up, hold to 70 %, then fall linearly to zero: a cosine froze plateaus."""
    warm = min(1.0, (step + 1) / min(300, steps))
    return warm * min(1.0, (1 - step / steps) / 0.3)


def _worker(first: int, stride: int, tokenizer: str, queue: multiprocessing.Queue, options: dict) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    torch.set_num_threads(1)
    encoder = Encoder(tokenizer)
    for number in range(first, options["steps"], stride):
        level = level_at(number / options["steps"])
        queue.put(make_batch(encoder, number, options["rows"], level, options["seed"]))


def batches(tokenizer: str, options: dict, workers: int) -> Iterator[Batch]:
    """The run's batches in order; worker w makes every `workers`-th one."""
    context = multiprocessing.get_context("fork")
    queues = [context.Queue(maxsize=4) for _ in range(workers)]
    processes = [
        context.Process(target=_worker, args=(w, workers, tokenizer, queues[w], options), daemon=True)
        for w in range(workers)
    ]
    for process in processes:
        process.start()
    for number in range(options["steps"]):
        yield queues[number % workers].get()
    for process in processes:
        process.join()


def to_device(batch: Batch, device: str) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(array).to(device, non_blocking=True).long()
        if array.dtype.kind == "i"
        else torch.from_numpy(array).to(device)
        for name, array in vars(batch).items()
    }


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


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a quintic Newton-Schulz iteration (K. Jordan, 2024).

    Matrices of one shape are stacked, so that a step is a few batched products. Scaled to Adam's update size.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self._update(params, group)

    def _update(self, params: list[nn.Parameter], group: dict) -> None:
        grads = torch.stack([p.grad for p in params])
        state = self.state[params[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grads)
        momentum = state["momentum"]
        momentum.lerp_(grads, 1 - group["momentum"])
        update = orthogonal(grads.lerp(momentum, group["momentum"]))
        scale = 0.2 * max(update.shape[-2:]) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(update.to(params[0].dtype).unbind()), alpha=-group["lr"] * scale)


def orthogonal(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices of g [n, rows, columns], roughly: singular values in about (.7, 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x if wide else x.mT


def optimizers(model: TinyLLaDA, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, Adam for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "wte" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "wte" in name]
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=others[0].is_cuda)
    return [Muon(matrices, lr=lr), adam]


def train(model: TinyLLaDA, encoder_path: str, options: dict, out: Path, device: str, save_every: float) -> None:
    """Run all steps, keeping an average of the weights, which the model ends with."""
    torch.manual_seed(options["seed"])
    objective: nn.Module = Objective(model)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        objective = torch.compile(objective)
    weights = list(model.parameters())
    average = [w.detach().clone() for w in weights]
    steppers = optimizers(model, LEARNING_RATE)
    started = saved = time.time()
    hits = torch.zeros(2, len(SOURCES) + 1, device=device)
    losses = torch.zeros((), device=device)
    for step, batch in enumerate(batches(encoder_path, options, options["workers"])):
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = LEARNING_RATE * rate_at(step, options["steps"])
        arrays = to_device(batch, device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, right = objective(arrays)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        decay = min(0.999, step / (step + 10))
        torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - decay)
        place = arrays["loss_source"] % (len(SOURCES) + 1)
        hits += torch.stack(
            [torch.bincount(place, w, len(SOURCES) + 1) for w in (right.float(), torch.ones_like(place).float())]
        )
        losses += loss.detach()
        if (step + 1) % options["log_every"] == 0:
            _log(step + 1, started, losses / options["log_every"], hits)
            hits.zero_(), losses.zero_()
        if time.time() - saved > save_every:
            saved = time.time()
            _export_average(model, average, out)
    with torch.no_grad():
        for w, mean in zip(weights, average, strict=True):
            w.copy_(mean)
    print(f"trained {options['steps']} steps in {(time.time() - started) / 60:.1f} minutes", flush=True)


def _log(step: int, started: float, loss: Tensor, hits: Tensor) -> None:
    rates = (hits[0] / hits[1].clamp(min=1)).tolist()
    text = "  ".join(f"{source} {rate:.3f}" for source, rate in zip(SOURCES, rates, strict=False))
    print(
        f"step {step}  {time.time() - started:.0f} s  loss {loss.item():.4f}  masked content right: {text}", flush=True
    )


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for config, tokenizer and weights")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a smaller model")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default {FULL['steps']})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = dict(SMOKE if args.smoke else FULL)
    options |= {"seed": args.seed, "workers": max(1, multiprocessing.cpu_count() - 1)}
    if args.steps:
        options["steps"] = args.steps
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(2_000 if args.smoke else 60_000, args.seed), args.out)
    path = str(args.out / "tokenizer.json")
    encoder = Encoder(path)
    torch.manual_seed(args.seed)
    model = TinyLLaDA(new_shape(encoder, options["shape"])).to(device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f}M parameters on {device}; {options['rows'] * ROW} tokens a step; {options}", flush=True)
    train(model, path, options, args.out, device, save_every=math.inf if args.smoke else 60)
    export(model, args.out)
    model.load_state_dict({name: w.bfloat16().float() for name, w in model.state_dict().items()})  # what was exported
    report(model, encoder, heldout_rows(options["eval_rows"], "validation"))


if __name__ == "__main__":
    main()
