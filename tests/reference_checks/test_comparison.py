"""The comparison of two results, itself tested."""

import dataclasses

import pytest
from safetensors.torch import save_file

from tests import comparison
from tests.checkpoints import write_checkpoint
from tests.reference import Reference, Result, Settings, Step
from tests.reference_checks.inputs import load_all, prompts


@dataclasses.dataclass
class Output:
    token_ids: list[int]
    finish_reason: str = "length"
    stop_reason: int | None = None


def result_with(margins: list[float]) -> Result:
    """Two blocks of two, tokens 1 2 3 4, revealed in the order 1, 0, 2, 3, with the given margins."""
    settings = Settings(max_tokens=4, block_length=2, stop_ids=(9,))
    steps = [Step([i], margin) for i, margin in zip([1, 0, 2, 3], margins, strict=True)]
    return Result(settings, [1, 2, 3, 4], [1, 2, 3, 4], blocks=[steps[:2], steps[2:]])


def test_equal_outputs_pass():
    comparison.assert_equivalent([(result_with([1.0] * 4), Output([1, 2, 3, 4]))])


@pytest.mark.parametrize("margin", [0.0, 1e-4])
@pytest.mark.parametrize(
    "output",
    [
        Output([1, 2, 3, 5]),
        Output([8, 2, 3, 4]),
        Output([1, 2, 3]),
        Output([1, 2, 3, 4, 4]),
        Output([1, 2, 3], "stop", 9),
        Output([1, 2, 3, 4], "stop", 9),
        Output([1, 2, 3, 4], "stop", 4),
        Output([], "length"),
    ],
)
def test_a_wrong_output_fails(output, margin):
    pairs = [(result_with([1.0] * 4), Output([1, 2, 3, 4]))] * 200
    with pytest.raises(AssertionError, match="1 of 201 sequences differ"):
        comparison.assert_equivalent([*pairs, (result_with([1.0] * 4), output)], margin=margin)


@pytest.mark.parametrize(
    "margins, output, passes",
    [
        ([1e-5, 1, 1, 1], Output([1, 5, 6, 7]), True),  # all that follows a near-tie may differ
        ([1e-5, 1, 1, 1], Output([5, 2, 6, 7]), True),  # an earlier step of the block was the near-tie
        ([1, 1e-5, 1, 1], Output([5, 2, 6, 7]), True),
        ([1, 1e-5, 1, 1], Output([1, 5, 6, 7]), False),  # a later step does not excuse an earlier one
        ([1, 1e-5, 1, 1], Output([5, 5, 3, 4]), False),
        ([1e-5, 1, 1, 1], Output([1, 2, 3, 5]), False),  # nor does another block
        ([1, 1, 1, 1e-5], Output([1, 2, 3], "stop", 9), True),
        ([1, 1, 1, 1e-5], Output([1, 2], "stop", 9), False),
        ([1, 1, 1e-5, 1], Output([1, 2], "stop", 9), True),
        ([1e-5] * 4, Output([1, 2], "stop", 8), False),  # 8 is no stop
        ([1e-5] * 4, Output([1, 2, 3]), False),  # too short is no near-tie
        ([1e-5] * 4, Output([1, 9, 5, 5]), True),  # the caller says whether a stop in the middle is one
    ],
)
def test_near_ties(margins, output, passes):
    expected = result_with(margins)
    found = comparison.difference(expected, output)
    assert (found.margin < comparison.NEAR_TIE) is passes
    pairs = [(result_with([1.0] * 4), Output([1, 2, 3, 4]))] * 100
    if passes:
        comparison.assert_equivalent([*pairs, (expected, output)], margin=comparison.NEAR_TIE)
    with pytest.raises(AssertionError):
        comparison.assert_equivalent([*pairs, (expected, output)])
    with pytest.raises(AssertionError):
        comparison.assert_equivalent([*pairs[:98], (expected, output)], margin=comparison.NEAR_TIE)


@pytest.mark.parametrize(
    "margins, output, passes",
    [
        ([1e-5, 1, 1, 1], Output([1, 2, 3, 5]), True),  # a step of any block may be to blame
        ([1, 1e-5, 1, 1], Output([1, 2, 3, 5]), True),
        ([1, 1, 1, 1e-5], Output([5, 2, 3, 5]), False),  # but no later one than revealed a token that differs
        ([1, 1e-5, 1, 1], Output([1, 2, 5, 5]), False),
    ],
)
def test_near_ties_with_several_blocks_open(margins, output, passes):
    settings = Settings(max_tokens=4, block_length=2, stop_ids=(9,), block_add_threshold=0.5)
    steps = [Step([i], margin) for i, margin in zip([2, 0, 3, 1], margins, strict=True)]
    expected = Result(settings, [1, 2, 3, 4], [1, 2, 3, 4], blocks=[steps])
    assert (comparison.difference(expected, output).margin < comparison.NEAR_TIE) is passes


def test_a_genuine_near_tie_passes(tmp_path, folders):
    """Two vocabulary rows of the LM head almost the same: the reference says by how little it chose."""
    tensors = load_all(folders["dense"])
    head = tensors["model.transformer.ff_out.weight"]
    prompt = prompts(1, seed=13)[0]
    a = Reference(folders["dense"]).generate(prompt, max_tokens=1, block_length=1).tokens[0]
    b = next(i for i in range(55) if i != a)
    head[b] = head[a]
    head[b, 0] += 1e-6
    write_checkpoint(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    tied = Reference(tmp_path).generate(prompt, max_tokens=1, block_length=1)
    assert tied.tokens[0] in (a, b) and 0 < tied.blocks[0][0].margin < comparison.NEAR_TIE
    other = Output([a + b - tied.tokens[0]])
    unrelated = Output([next(i for i in range(55) if i not in (a, b))])
    pairs = [(tied, Output(tied.token_ids))] * 100
    comparison.assert_equivalent([*pairs, (tied, other)], margin=comparison.NEAR_TIE)
    with pytest.raises(AssertionError):
        comparison.assert_equivalent([*pairs, (tied, other)])
    assert comparison.difference(tied, unrelated).got != tied.tokens[0]
