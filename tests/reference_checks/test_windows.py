"""The reference with several blocks open, against one forward under a mask, and its laws."""

import pytest
import torch

from tests import reference, reference_windows
from tests.reference import STATIC, Reference, Result, Settings, predict, quota_at, step_limit
from tests.reference_checks.inputs import MASK, RULES, prompts
from tests.reference_checks.test_modes import masked_logits, sight
from tests.reference_windows import MODES

BLOCK_MODES = ("block", "block_refresh")


class Timeline:
    """When each output position of a run to its end was revealed, and what must follow from that, by the definitions.

    Blocks and steps count from 0; "before step t" is the state that step t sees.
    """

    def __init__(self, result: Result):
        self.settings = result.settings
        self.steps = sum(result.blocks, [])
        self.revealed = {i: t for t, step in enumerate(self.steps) for i in step.revealed}
        length, tokens = self.settings.block_length, self.settings.max_tokens
        self.blocks = [range(start, min(start + length, tokens)) for start in range(0, tokens, length)]
        self.opened = [0]
        for k in range(1, len(self.blocks)):
            enough = self.settings.block_add_threshold
            self.opened.append(next(t for t in range(self.opened[-1] + 1, 999) if self.progress(k - 1, t) >= enough))
        self.active = [0]
        for k in range(1, len(self.blocks)):
            enough = self.settings.decoded_token_threshold
            self.active.append(next(t for t in range(self.opened[k], 999) if self.progress(k - 1, t) >= enough))

    def masked(self, k: int, t: int) -> list[int]:
        return [i for i in self.blocks[k] if self.revealed[i] >= t]

    def progress(self, k: int, t: int) -> float:
        return (len(self.blocks[k]) - len(self.masked(k, t))) / len(self.blocks[k])

    def first_left(self, t: int) -> int:
        """The first block with a mask before step t."""
        return next(k for k in range(len(self.blocks)) if self.masked(k, t))

    def window(self, t: int) -> tuple[int, int, int]:
        """The window's start and end, and the end of the suffix that is kept, as output positions."""
        start = self.blocks[self.first_left(max(0, t - self.settings.commit_delay))].start
        end = max(block.stop for block, opened in zip(self.blocks, self.opened, strict=True) if opened <= t)
        return start, end, min(end + self.settings.suffix_window, self.settings.max_tokens)

    def refresh(self, t: int) -> int:
        """The last step, up to t, whose window starts elsewhere than that of the step before."""
        return max(u for u in range(t + 1) if u == 0 or self.window(u)[0] != self.window(u - 1)[0])


def run(model: Reference, prompt_seed: int = 0, **settings) -> tuple[list[int], Result]:
    prompt = prompts(1, seed=prompt_seed)[0]
    return prompt, model.generate(prompt, **settings)


# --- each step once more, without a cache ---

SEVERAL = dict(max_tokens=19, block_length=5, block_add_threshold=0.3, decoded_token_threshold=0.5)
VARIANTS = {
    "threshold": dict(unmasking="threshold", threshold=0.6),
    "low_confidence": dict(unmasking="low_confidence", temperature=0.6, seed=4),
    "guided": dict(unmasking="threshold", threshold=0.5, cfg_scale=0.8, block_add_threshold=0.0),
    "kept": dict(unmasking="threshold", threshold=0.6, suffix_window=3),
    "delayed": dict(unmasking="low_confidence", denoising_steps=3, suffix_window=1, commit_delay=2),
}
RUNS = [
    (mode, variant)
    for mode in MODES
    for variant in VARIANTS
    if mode in BLOCK_MODES or not VARIANTS[variant].get("suffix_window")
    if mode == "block" or not VARIANTS[variant].get("commit_delay")
]


@pytest.mark.parametrize("shape", ["dense", "gqa"])
@pytest.mark.parametrize("mode, variant", RUNS)
def test_every_step_equals_one_forward_under_a_mask(folders, mode, variant, shape):
    """Stale K/V are rows of the canvas as it was; what each step saw and chose is derived from its reveals alone."""
    model = Reference(folders[shape])
    prompt, result = run(model, 4, mode=mode, **SEVERAL | VARIANTS[variant])
    timeline = Timeline(result)
    assert max(sum(timeline.opened[k] <= t for k in range(4)) - timeline.first_left(t) for t in range(result.steps)) > 1
    for t, step in enumerate(timeline.steps):
        logits = again(model, mode, timeline, prompt, result.tokens, t)
        scale = result.settings.cfg_scale
        if scale:
            without = again(model, mode, timeline, [MASK] * len(prompt), result.tokens, t)
            logits = without + (scale + 1) * (logits - without)
        expected = chosen_again(model, timeline, logits, t)
        assert step.revealed == sorted(expected)
        assert [result.tokens[i] for i in step.revealed] == [expected[i] for i in sorted(expected)]


def again(model, mode, timeline, prompt, tokens, t) -> torch.Tensor:
    """Logits of the output positions, by step t's own rows; NaN where it has none."""

    def canvas(u: int) -> list[int]:
        return prompt + [token if timeline.revealed[i] < u else MASK for i, token in enumerate(tokens)]

    P, C = len(prompt), len(prompt) + len(tokens)
    start, end, suffix_end = (P + i for i in timeline.window(t))
    u = timeline.refresh(t)
    old, new = {
        "vanilla": (range(0), range(C)),
        "prefix_cache": (range(C), range(start, C)),
        "dual_cache": (range(C), range(start, end)),
        "block": (range(start), range(start, suffix_end)),
        "block_refresh": (range(P + timeline.window(u)[2]), range(start, suffix_end)),
    }[mode]
    stale = canvas(t if mode == "block" else u)  # a committed block's tokens are final
    sees = sight(old, new, [P, timeline.settings.block_length] if mode == "block" else None)
    rows = [stale[i] for i in old] + [canvas(t)[i] for i in new]
    logits = masked_logits(model, rows, torch.tensor([*old, *new]), sees)[len(old) :]
    found = torch.full((C, logits.shape[1]), torch.nan, dtype=logits.dtype)
    found[list(new)] = logits
    return found[P:]


def chosen_again(model, timeline, logits, t) -> dict[int, int]:
    """The token of each output position that step t must reveal."""
    settings, tokens, rank, chosen = timeline.settings, {}, {}, set()
    open_blocks = [k for k in range(len(timeline.blocks)) if timeline.opened[k] <= t and timeline.masked(k, t)]
    for k in open_blocks:
        left, n = timeline.masked(k, t), len(timeline.blocks[k])
        predicted = predict(logits[left], left, t - timeline.opened[k], model.config, settings)
        tokens |= dict(zip(left, predicted.tokens, strict=True))
        rank |= dict(zip(left, predicted.scores, strict=True))
        if settings.unmasking in STATIC and timeline.active[k] <= t:
            quota = quota_at(t - timeline.active[k], n, step_limit(n, settings))
            chosen |= set(sorted(left, key=lambda i: -rank[i])[:quota])
    if settings.unmasking == "threshold":
        chosen = {i for i in rank if 1 + rank[i] >= settings.threshold} | {max(rank, key=rank.get)}
        if not chosen & set(timeline.blocks[open_blocks[0]]):
            chosen.add(max(timeline.masked(open_blocks[0], t), key=rank.get))
    return {i: tokens[i] for i in chosen}


# --- laws ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", list(MODES))
def test_thresholds_of_1_are_one_block_at_a_time(model, mode, rule):
    """Result for result what the reference for one block at a time says, down to margins and log-probabilities."""
    common = dict(mode=mode, unmasking=rule, threshold=0.5, entropy_bound=1.0, block_length=5, stop_ids=(3, 9, 20))
    variants = [dict(denoising_steps=2), dict(temperature=0.7, seed=3, decoded_token_threshold=0), dict(cfg_scale=0.6)]
    for prompt, more in zip(prompts(3, seed=1), variants, strict=True):
        settings = Settings(**common, max_tokens=12, **more)
        assert settings.one_block_at_a_time
        expected, got = (way.generate(model, prompt, settings) for way in (reference, reference_windows))
        assert facts(got) == facts(expected)
        steps = zip(sum(got.blocks, []), sum(expected.blocks, []), strict=True)
        assert all(torch.equal(a.logprobs, b.logprobs) for a, b in steps)


def facts(result: Result) -> tuple:
    return (
        (result.tokens, result.token_ids, result.finish_reason, result.stop_reason, result.steps, result.nfe),
        [[(step.revealed, step.margin) for step in block] for block in result.blocks],
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", list(MODES))
def test_add_threshold_0_opens_a_block_a_step(model, mode, rule):
    _, result = run(model, mode=mode, unmasking=rule, max_tokens=22, block_length=6, block_add_threshold=0.0)
    for t, step in enumerate(sum(result.blocks, [])):
        assert step.open[-1] == min(t, 3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("denoising_steps", [None, 1, 3])
def test_every_position_is_revealed_once_and_by_its_block_s_schedule(model, mode, rule, denoising_steps):
    options = dict(threshold=0.6, factor=0.8, entropy_bound=0.3, entropy_threshold=0.3)
    settings = dict(mode=mode, unmasking=rule, denoising_steps=denoising_steps, max_tokens=19, block_length=8)
    for add, decoded in ((0.0, 0.0), (0.5, 0.5), (0.1, 1.0), (0.5, 0.1)):
        _, result = run(model, 9, **settings, **options, block_add_threshold=add, decoded_token_threshold=decoded)
        timeline = Timeline(result)
        assert sorted(i for step in timeline.steps for i in step.revealed) == list(range(19))
        assert MASK not in result.tokens and result.token_ids == result.tokens and result.nfe == len(timeline.steps)
        for k, block in enumerate(timeline.blocks):
            limit = step_limit(len(block), result.settings)
            counts = [sum(i in block for i in step.revealed) for step in timeline.steps]
            if rule in STATIC:
                schedule = [quota_at(step, len(block), limit) for step in range(limit)]
                assert counts == ([0] * timeline.active[k] + schedule + [0] * len(counts))[: len(counts)]
            else:
                assert not any(counts[: timeline.opened[k]])
                assert limit is None or not any(counts[timeline.active[k] + limit :])
        if rule not in STATIC:
            assert all(set(s.revealed) & set(timeline.blocks[timeline.first_left(t)])
                       for t, s in enumerate(timeline.steps))  # fmt: skip


def test_blocks_wait_until_they_are_active(model):
    """A rule with a schedule: the next block is open from the first step on, and fills when its turn has come."""
    common = dict(max_tokens=16, block_length=8, block_add_threshold=0.0)
    starts = {}
    for decoded in (0.0, 0.25, 0.5, 1.0):
        _, result = run(model, **common, decoded_token_threshold=decoded)
        starts[decoded] = next(t for t, step in enumerate(sum(result.blocks, [])) if max(step.revealed) >= 8)
    assert starts == {0.0: 1, 0.25: 2, 0.5: 4, 1.0: 8}


def test_a_limit_counts_from_the_step_in_which_its_block_is_active(model):
    """Of a rule without a schedule, too, though it reveals in a block that is not active."""
    common = dict(unmasking="threshold", threshold=1.0, denoising_steps=3, max_tokens=16, block_length=8)
    for decoded, forced_at in ((0.0, [2, 3]), (0.125, [2, 3]), (0.25, [2, 4]), (1.0, [2, 5])):
        _, result = run(model, **common, block_add_threshold=0.1, decoded_token_threshold=decoded)
        assert [t for t, step in enumerate(sum(result.blocks, [])) if step.forced] == forced_at


def test_opening_early_takes_fewer_steps(model):
    common = dict(mode="vanilla", max_tokens=24, block_length=8, denoising_steps=4)
    steps = [run(model, **common, block_add_threshold=t, decoded_token_threshold=t)[1].steps for t in (1.0, 0.5, 0.0)]
    assert steps == [12, 4 + 2 + 2, 4 + 1 + 1]


def test_a_stop_token_ends_a_request_once_all_before_it_is_revealed(model):
    ended_before_its_block, in_a_later_block = 0, 0
    for seed in range(12):
        common = dict(unmasking="threshold", threshold=0.4, max_tokens=24, block_length=8, block_add_threshold=0.25)
        prompt, free = run(model, seed, **common)
        timeline = Timeline(free)
        stop = free.tokens[4 + seed]
        first = free.tokens.index(stop)
        result = model.generate(prompt, **common, stop_ids=(stop,))
        assert (result.finish_reason, result.stop_reason) == ("stop", stop)
        assert result.token_ids == free.tokens[:first]
        last = max(timeline.revealed[i] for i in range(first + 1))
        assert result.steps == last + 1
        ended_before_its_block += any(timeline.revealed[i] > last for i in timeline.blocks[first // 8])
        in_a_later_block += last > timeline.revealed[first]
    assert ended_before_its_block > 3 and in_a_later_block > 1


def test_one_block_at_a_time_a_stop_token_waits_for_its_block(model):
    """An add threshold that only a full block reaches is still one below 1."""
    common = dict(mode="block", unmasking="sequential", max_tokens=16, block_length=8)
    prompt, free = run(model, **common)
    stop = free.tokens[3]
    first = free.tokens.index(stop)
    for more, steps in (({}, 8), (dict(suffix_window=2), 8), (dict(block_add_threshold=0.95), first + 1)):
        result = model.generate(prompt, **common, **more, stop_ids=(stop,))
        assert (result.token_ids == free.tokens[:first] or "suffix_window" in more) and result.steps == steps


def test_all_modes_agree_where_every_step_is_a_refresh(model):
    """A step a block, one at a time, and the suffix kept to the canvas's end: whole canvases."""
    common = dict(max_tokens=18, block_length=4, denoising_steps=1)
    for prompt in prompts(3, seed=6):
        expected = model.generate(prompt, mode="vanilla", **common).tokens
        for mode in ("prefix_cache", "dual_cache"):
            assert model.generate(prompt, mode=mode, **common).tokens == expected
        assert model.generate(prompt, mode="block_refresh", **common, suffix_window=14).tokens == expected
        assert model.generate(prompt, mode="block_refresh", **common).tokens != expected
