"""LLaDA and its decoding, plain: one request at a time, every forward written out, nothing shared with the engine.

The model follows the published LLaDA: pre-norm RMSNorm, half-rotation RoPE, SwiGLU, attention without any mask, logits
not shifted. Each decoding mode is written from its own meaning, with explicit keys and values per layer. Besides the
tokens, `generate` returns by how much each step was decided, so that a float32 run can be judged.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

KV = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: keys (after RoPE) and values, [S, HK, D] each
TOKEN_NOISE, RANDOM_RULE = 0, 1  # purposes of the counter-based generator


class Reference:
    """A checkpoint folder's model; `dtype` float64 computes everything, RoPE's angles included, in float64."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float64, device: str = "cpu"):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.device = device
        self.weights = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                self.weights[name.removeprefix("model.transformer.")] = tensor.to(device, dtype)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = x.to(self.wide)
        x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x.to(self.dtype) * self.weights[name + ".weight"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[name + ".weight"].T

    def rope(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [T, heads, D]: the pair (x[i], x[i + D/2]) turned by position * theta**(-2i/D)."""
        D = x.shape[-1]
        frequencies = self.config["rope_theta"] ** -(torch.arange(0, D, 2, device=x.device).to(self.wide) / D)
        angles = positions.to(self.wide)[:, None, None] * frequencies
        a, b = x.to(self.wide).chunk(2, dim=-1)
        turned = [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()]
        return torch.cat(turned, dim=-1).to(self.dtype)

    def forward(
        self, tokens: list[int], first: int = 0, before: KV | None = None, after: KV | None = None
    ) -> tuple[torch.Tensor, KV]:
        """Rows for `tokens` at positions first, first + 1, ...; each sees `before`, all these rows, and `after`.

        Returns the final hidden states [T, d_model] (normed) and the rows' own keys and values.
        """
        heads = self.config["n_heads"]
        kv_heads = self.config.get("n_kv_heads") or heads
        T, D = len(tokens), self.config["d_model"] // heads
        positions = torch.arange(first, first + T, device=self.device)
        x = self.weights["wte.weight"][torch.tensor(tokens, device=self.device)]
        own: KV = []
        for layer in range(self.config["n_layers"]):
            name = f"blocks.{layer}."
            h = self.norm(x, name + "attn_norm")
            q = self.rope(self.linear(h, name + "q_proj").view(T, heads, D), positions)
            k = self.rope(self.linear(h, name + "k_proj").view(T, kv_heads, D), positions)
            v = self.linear(h, name + "v_proj").view(T, kv_heads, D)
            own.append((k, v))
            parts = [kv[layer] for kv in (before, own, after) if kv is not None]
            keys = torch.cat([part[0] for part in parts]).repeat_interleave(heads // kv_heads, dim=1)
            values = torch.cat([part[1] for part in parts]).repeat_interleave(heads // kv_heads, dim=1)
            scores = torch.einsum("thd,shd->hts", q, keys).to(self.wide) / math.sqrt(D)
            attended = torch.einsum("hts,shd->thd", scores.softmax(-1).to(self.dtype), values)
            x = x + self.linear(attended.reshape(T, heads * D), name + "attn_out")
            h = self.norm(x, name + "ff_norm")
            gate = self.linear(h, name + "ff_proj")
            x = x + self.linear(gate * torch.sigmoid(gate) * self.linear(h, name + "up_proj"), name + "ff_out")
        return self.norm(x, "ln_f"), own

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden, "wte" if self.config["weight_tying"] else "ff_out")

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[T, columns]: the model on a whole sequence, every position seeing every other."""
        return self.head(self.forward(tokens)[0])

    def generate(self, prompt_ids: list[int], **settings) -> "Result":
        """Decode one request; `settings` are those of `Settings`."""
        from tests import reference_windows  # it is built on what is here

        wanted = Settings(**settings)
        way = generate if wanted.one_block_at_a_time else reference_windows.generate
        return way(self, prompt_ids, wanted)


def cut(kv: KV, start: int, end: int | None = None) -> KV:
    return [(k[start:end], v[start:end]) for k, v in kv]


def join(a: KV, b: KV) -> KV:
    return [(torch.cat([ka, kb]), torch.cat([va, vb])) for (ka, va), (kb, vb) in zip(a, b, strict=True)]


class Vanilla:
    """Every step sees the whole canvas and recomputes all of it."""

    def __init__(self, model: Reference, prompt_ids: list[int]):
        self.model = model

    def logits(self, canvas: list[int], start: int, end: int, step: int) -> torch.Tensor:
        """Logits of the block [start, end), final or masked, for its step-th denoising step."""
        hidden, _ = self.model.forward(canvas)
        return self.model.head(hidden[start:end])

    def finish(self, canvas: list[int], start: int, end: int) -> None:
        """The block [start, end) is final and another follows."""


class PrefixCache(Vanilla):
    """The first step's keys and values before the block serve the block's later steps; the rest is recomputed."""

    def logits(self, canvas, start, end, step):
        if step == 0:
            hidden, kv = self.model.forward(canvas)
            self.prefix = cut(kv, 0, start)
            return self.model.head(hidden[start:end])
        hidden, _ = self.model.forward(canvas[start:], start, before=self.prefix)
        return self.model.head(hidden[: end - start])


class DualCache(Vanilla):
    """The first step's keys and values before and after the block serve the block's later steps."""

    def logits(self, canvas, start, end, step):
        if step == 0:
            hidden, self.kv = self.model.forward(canvas)
            return self.model.head(hidden[start:end])
        hidden, _ = self.model.forward(canvas[start:end], start, cut(self.kv, 0, start), cut(self.kv, end))
        return self.model.head(hidden)


class Block(Vanilla):
    """The prompt is computed alone, each finished block once more on what is before it; both are kept for good."""

    def __init__(self, model: Reference, prompt_ids: list[int]):
        self.model = model
        _, self.committed = model.forward(prompt_ids)

    def logits(self, canvas, start, end, step):
        hidden, _ = self.model.forward(canvas[start:end], start, before=self.committed)
        return self.model.head(hidden)

    def finish(self, canvas, start, end):
        _, kv = self.model.forward(canvas[start:end], start, before=self.committed)
        self.committed = join(self.committed, kv)


class BlockRefresh(Vanilla):
    """The first step recomputes all up to the block's end; what is before the block serves its later steps."""

    def logits(self, canvas, start, end, step):
        if step == 0:
            hidden, kv = self.model.forward(canvas[:end])
            self.before = cut(kv, 0, start)
            return self.model.head(hidden[start:end])
        hidden, _ = self.model.forward(canvas[start:end], start, before=self.before)
        return self.model.head(hidden)


MODES = {
    "vanilla": Vanilla,
    "prefix_cache": PrefixCache,
    "dual_cache": DualCache,
    "block": Block,
    "block_refresh": BlockRefresh,
}


@dataclass(frozen=True)
class Settings:
    mode: str = "block"
    unmasking: str = "low_confidence"
    max_tokens: int = 128
    block_length: int = 32
    denoising_steps: int | None = None
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.15
    entropy_threshold: float = 0.5
    temperature: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()  # what logits_eos_inf and confidence_eos_eot_inf mean by eos
    eot_ids: tuple[int, ...] = ()
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    cfg_scale: float = 0.0
    block_add_threshold: float = 1.0
    decoded_token_threshold: float = 1.0
    suffix_window: int = 0
    commit_delay: int = 0

    @property
    def one_block_at_a_time(self) -> bool:
        """And no row but its own; then nothing depends on decoded_token_threshold."""
        return self.block_add_threshold == 1.0 and not self.suffix_window and not self.commit_delay


@dataclass(frozen=True)
class Step:
    """One denoising step: the output positions revealed, the log-probabilities there, and how far the step was from
    revealing anything else.

    `margin` is the least of the gap between the top two logits (with their noise), the gap in confidence or entropy at
    the cut, and the distance from a threshold or bound.
    """

    revealed: list[int]
    margin: float
    logprobs: torch.Tensor | None = None  # [revealed, ids], -inf of those that do not compete


@dataclass
class Result:
    """`tokens` holds all final blocks, the stop token and what follows it included; `token_ids` ends before it.

    `blocks` holds the steps, in order, by the first block that was not finished before them.
    """

    settings: Settings
    tokens: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stop_reason: int | None = None
    blocks: list[list[Step]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return sum(len(block) for block in self.blocks)

    @property
    def nfe(self) -> int:
        """Forwards: the prompt's and the commits ride along with a block's first step and count nothing. With guidance
        each is two."""
        return self.steps * (2 if self.settings.cfg_scale else 1)


class Guided:
    """Two decoders side by side, one of which sees mask tokens where anything is given; their logits together."""

    def __init__(self, model: Reference, mode: type, canvas: list[int], given: set[int], P: int, scale: float):
        self.with_prompt, self.scale, self.given = mode(model, canvas[:P]), scale, given
        self.mask = model.config["mask_token_id"]
        self.without = mode(model, self.hidden(canvas)[:P]) if scale else None

    def hidden(self, canvas: list[int]) -> list[int]:
        return [self.mask if i in self.given else token for i, token in enumerate(canvas)]

    def logits(self, canvas, start, end, step):
        logits = self.with_prompt.logits(canvas, start, end, step)
        if not self.scale:
            return logits
        other = self.without.logits(self.hidden(canvas), start, end, step)
        return other + (self.scale + 1) * (logits - other)

    def finish(self, canvas, start, end):
        self.with_prompt.finish(canvas, start, end)
        if self.scale:
            self.without.finish(self.hidden(canvas), start, end)


def generate(model: Reference, prompt_ids: list[int], settings: Settings) -> Result:
    P = len(prompt_ids)
    canvas = list(prompt_ids) + [model.config["mask_token_id"]] * settings.max_tokens
    mode = Guided(model, MODES[settings.mode], canvas, set(range(P)), P, settings.cfg_scale)
    result = Result(settings)
    for start in range(P, len(canvas), settings.block_length):
        end = min(start + settings.block_length, len(canvas))
        result.blocks.append(denoise(model, mode, canvas, list(range(start, end)), start, end, P, settings))
        result.tokens = canvas[P:end]
        stops = [i for i, token in enumerate(result.tokens) if token in settings.stop_ids]
        if stops:
            result.token_ids = result.tokens[: stops[0]]
            result.finish_reason, result.stop_reason = "stop", result.tokens[stops[0]]
            return result
        if end < len(canvas):
            mode.finish(canvas, start, end)
    result.token_ids = list(result.tokens)
    return result


def infill(model: Reference, tokens: list[int | None], settings: Settings) -> Result:
    """The canvas with its masked positions (None) filled: `tokens` of the result is all of it."""
    canvas = [model.config["mask_token_id"] if token is None else token for token in tokens]
    left = [i for i, token in enumerate(tokens) if token is None]
    P, last = left[0], left[-1]
    mode = Guided(model, MODES[settings.mode], canvas, set(range(len(tokens))) - set(left), P, settings.cfg_scale)
    result = Result(settings)
    while left:
        start, end = left[0], min(left[0] + settings.block_length, last + 1)
        block, left = [i for i in left if i < end], [i for i in left if i >= end]
        result.blocks.append(denoise(model, mode, canvas, block, start, end, P, settings))
    result.tokens = canvas
    return result


def denoise(
    model: Reference,
    mode: Guided,
    canvas: list[int],
    masked: list[int],
    start: int,
    end: int,
    P: int,
    settings: Settings,
) -> list[Step]:
    """Reveals the masked positions of the block [start, end) in the canvas."""
    number = len(masked)
    limit = step_limit(number, settings)
    steps: list[Step] = []
    while masked:
        step = len(steps)
        logits = mode.logits(canvas, start, end, step)[[i - start for i in masked]]
        last = limit is not None and step == limit - 1
        quota = quota_at(step, number, limit) if settings.unmasking in COUNTED else None
        predicted = predict(logits, [i - P for i in masked], step, model.config, settings)
        chosen, margin = reveal(predicted, quota, last, settings)
        for i in chosen:
            canvas[masked[i]] = predicted.tokens[i]
        steps.append(Step([masked[i] - P for i in chosen], margin, log_distribution(logits[chosen], model, settings)))
        masked = [position for i, position in enumerate(masked) if i not in chosen]
    return steps


def log_distribution(logits: torch.Tensor, model: Reference, settings: Settings) -> torch.Tensor:
    """[n, vocab_size]: what the model says of positions, but for what can never be revealed."""
    competing = torch.zeros(model.config["vocab_size"], dtype=torch.bool)
    competing[[i for i in range(len(competing)) if i != model.config["mask_token_id"]]] = True
    if settings.logits_eos_inf:
        competing[list(settings.eos_ids)] = False
    x = torch.where(competing, logits[:, : len(competing)].cpu(), -math.inf)
    return x - x.logsumexp(-1, keepdim=True)


def step_limit(n: int, settings: Settings) -> int | None:
    """Steps for a block of n positions; None: as many as it takes."""
    if settings.denoising_steps is None:
        return n if settings.unmasking in COUNTED else None
    return min(math.ceil(settings.denoising_steps * n / settings.block_length), n)


def quota_at(step: int, n: int, steps: int) -> int:
    """How many of n positions the step-th of `steps` steps reveals: n / steps, the remainder to the first ones."""
    return n // steps + (1 if step < n % steps else 0)


@dataclass
class Prediction:
    """Of the masked positions, in order: what each would become, how surely, and whether it may pass a threshold."""

    tokens: list[int]
    token_margins: list[float]
    scores: list[float]  # minus what all other tokens have, or a random number
    entropy: list[float]


def predict(logits: torch.Tensor, positions: list[int], step: int, config: dict, settings: Settings) -> Prediction:
    """logits [n, columns] at the given output positions. The mask token and ids from vocab_size on do not compete."""
    ids = [i for i in range(config["vocab_size"]) if i != config["mask_token_id"]]
    x = logits.cpu().to(torch.float64 if logits.dtype == torch.float64 else torch.float32)[:, ids]
    x = torch.where(x.isnan(), -math.inf, x)
    if settings.logits_eos_inf:
        x[:, [column for column, i in enumerate(ids) if i in settings.eos_ids]] = -math.inf
    scores = x.double()
    if settings.temperature > 0:
        noise = -np.log(-np.log(uniform(settings.seed, np.array(ids), np.array(positions)[:, None], step, TOKEN_NOISE)))
        scores = scores + settings.temperature * torch.from_numpy(noise)
    best = scores.argmax(-1)  # the first of equals
    held_back = settings.eos_ids + settings.eot_ids if settings.confidence_eos_eot_inf else ()
    x[:, [column for column, i in enumerate(ids) if i in held_back]] = -math.inf
    p = distribution(x)
    others = [sum(row[:k] + row[k + 1 :]) for row, k in zip(p.tolist(), best.tolist(), strict=True)]
    ranked = (-np.array(others)).astype(np.float32).tolist()
    entropy = torch.special.entr(p).sum(-1).float().tolist()
    tokens = [ids[column] for column in best.tolist()]
    if settings.unmasking == "random":
        drawn = uniform(settings.seed, np.array(0), np.array(positions), step, RANDOM_RULE)
        ranked = drawn.astype(np.float32).tolist()
    for i, token in enumerate(tokens):
        if token in held_back:
            ranked[i], entropy[i] = -math.inf, math.inf
    return Prediction(tokens, [top_two_gap(row) for row in scores.tolist()], ranked, entropy)


def distribution(x: torch.Tensor) -> torch.Tensor:
    """Softmax of each row; candidates equal at an infinite maximum share the probability evenly."""
    top = x.max(-1, keepdim=True).values
    equal = (x == top).to(x.dtype)
    return torch.where(top.isinf(), equal / equal.sum(-1, keepdim=True), x.softmax(-1))


def top_two_gap(scores: list[float]) -> float:
    first, second = sorted(scores, reverse=True)[:2] if len(scores) > 1 else (scores[0], -math.inf)
    return 0.0 if first == second else first - second


STATIC = ("low_confidence", "random", "sequential")
# these have a quota in every step
COUNTED = (*STATIC, "scheduled_threshold")


def reveal(predicted: Prediction, quota: int | None, last: bool, settings: Settings) -> tuple[list[int], float]:
    """The chosen indices into the masked positions, ascending, and the step's margin."""
    n = len(predicted.tokens)
    if last:
        chosen, margin = list(range(n)), math.inf
    elif settings.unmasking == "sequential":
        chosen, margin = list(range(quota)), math.inf
    elif settings.unmasking in STATIC:
        chosen, margin = by_rank(predicted.scores, quota)
        # the `random` rule's ranks hold no rounding error
        margin = margin if settings.unmasking == "low_confidence" else math.inf
    elif settings.unmasking == "scheduled_threshold":
        chosen, margin = by_scheduled_threshold(predicted.scores, min(quota, n), settings.threshold)
    elif settings.unmasking == "threshold":
        chosen, margin = by_threshold(predicted.scores, settings.threshold)
    elif settings.unmasking == "factor":
        chosen, margin = by_factor(predicted.scores, settings.factor)
    elif settings.unmasking == "entropy":
        chosen, margin = by_entropy(predicted.entropy, settings.entropy_bound)
    elif settings.unmasking == "entropy_threshold":
        chosen, margin = by_entropy_threshold(predicted.entropy, settings.entropy_threshold)
    else:
        raise ValueError(f"no unmasking rule {settings.unmasking!r}")
    # A token not revealed still decides its position's confidence where it is sampled or where eos is held back.
    all_tokens_matter = not last and (settings.temperature > 0 or settings.confidence_eos_eot_inf)
    gaps = [predicted.token_margins[i] for i in (range(n) if all_tokens_matter else chosen)]
    return sorted(chosen), min([margin, *gaps])


def ranking(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def gap_after(values: list[float], count: int) -> float:
    """Between the count-th and the next of sorted values; equal infinities are not a near-tie but a rule."""
    if count == len(values) or math.isinf(values[count]):
        return math.inf
    return abs(values[count - 1] - values[count])


def by_rank(scores: list[float], quota: int) -> tuple[list[int], float]:
    order = ranking(scores)
    return order[:quota], gap_after([scores[i] for i in order], quota)


def by_threshold(scores: list[float], threshold: float) -> tuple[list[int], float]:
    """Others have at most 1 - threshold, which says more near certainty than that the token has the threshold."""
    most = float(np.float32(1 - threshold))
    margin = min(abs(score + most) for score in scores)
    passed = [i for i, score in enumerate(scores) if -score <= most]
    if passed:
        return passed, margin
    best, gap = by_rank(scores, 1)
    return best, min(margin, gap)


def by_scheduled_threshold(scores: list[float], quota: int, threshold: float) -> tuple[list[int], float]:
    """All that leave less than 1 - threshold to others, or, where they are fewer than the quota, the best ones."""
    most = -float(np.float32(threshold - 1))
    margin = min(abs(score + most) for score in scores)
    passed = [i for i, score in enumerate(scores) if -score < most]
    if len(passed) >= quota:
        return passed, margin
    best, gap = by_rank(scores, quota)
    return best, min(margin, gap)


def by_factor(scores: list[float], factor: float) -> tuple[list[int], float]:
    """Longest prefix of the ranking whose n-th member leaves at most factor / (n + 1); the first always does."""
    order = ranking(scores)
    count, margin = 1, math.inf
    for i in order[1:]:
        most = float(np.float32(factor / (count + 2)))
        margin = min(margin, abs(scores[i] + most))
        if -scores[i] > most:
            break
        count += 1
    return order[:count], min(margin, gap_after([scores[i] for i in order], count))


def by_entropy(entropy: list[float], bound: float) -> tuple[list[int], float]:
    """Largest prefix, by rising entropy, whose sum less its largest is within the bound (arXiv 2505.24857)."""
    order = sorted(range(len(entropy)), key=lambda i: (entropy[i], i))
    ordered = [entropy[i] for i in order]
    count, margin = 1, math.inf
    while count < len(ordered) and ordered[count] < math.inf:
        others = sum(ordered[:count])  # the prefix of count + 1, less its largest
        margin = min(margin, abs(others - bound))
        if others > bound:
            break
        count += 1
    return order[:count], min(margin, gap_after(ordered, count))


def by_entropy_threshold(entropy: list[float], most: float) -> tuple[list[int], float]:
    """All of at most so much, and the lowest one."""
    most = float(np.float32(most))
    margin = min(abs(value - most) for value in entropy)
    passed = [i for i, value in enumerate(entropy) if value <= most]
    if passed:
        return passed, margin
    best, gap = by_rank([-value for value in entropy], 1)
    return best, min(margin, gap)


def uniform(seed: int, vocabulary_id, position, step: int, purpose: int) -> np.ndarray:
    """53-bit uniforms in (0, 1), never 0, for broadcastable arrays of ids and output positions."""
    w0, w1, _, _ = philox4x32((seed & 0xFFFFFFFF, seed >> 32), (vocabulary_id, position, step, purpose))
    k = (w0 >> np.uint64(5)) * np.uint64(2**26) + (w1 >> np.uint64(6))
    return np.maximum(k, 1).astype(np.float64) * 2.0**-53


def philox4x32(key: tuple[int, int], counter: tuple) -> list[np.ndarray]:
    """Ten rounds of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), 32-bit words."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = key
    for _ in range(10):
        a = c0 * np.uint64(0xD2511F53)
        b = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]
