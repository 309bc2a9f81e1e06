"""Options of likelihoods."""

from dataclasses import dataclass

from blockinfer.checks import check_bool, check_choice, check_int, check_real, check_seed, refuse_unknown
from blockinfer.decoding.likelihood import SCORING_MODES
from blockinfer.hints import SCORING_HINTS


@dataclass(frozen=True, kw_only=True)
class ScoringParams:
    """Options of `LLM.score` and `LLM.choose`.

    mc_num: the most forwards for one continuation, each with other tokens of it masked (LLaDA's Monte Carlo estimate).
        A continuation of L tokens has 2**L - 1 masks; if that is at most mc_num, all are computed and the value is
        exact. If 2 L <= mc_num, every number of masked tokens gets its share of the forwards, and only the positions
        are drawn. Otherwise the number is drawn too, as LLaDA does.
    seed: of the random masks, 0 <= seed < 2**64. None draws one for the call, which the outputs report. Continuations
        of the same length share their masks.
    mode: vanilla is LLaDA's definition: the prompt's K and V depend on the continuation, so every forward computes
        them. block approximates it as decoding in that mode does: K and V depend on the prompt alone, and the forwards
        of a continuation that run at once share the pages that the prompt fills.
    cfg_scale: classifier-free guidance, as in SamplingParams.
    is_greedy: `score` also reports whether greedy decoding gives the continuation, one token at a time, the most
        confident first. This takes as many forwards as the continuation has tokens. `choose` refuses it.

    Raises ValueError for a value out of range and TypeError for an unknown option, naming it.
    """

    mc_num: int = 128
    seed: int | None = None
    mode: str = "vanilla"
    cfg_scale: float = 0.0
    is_greedy: bool = False

    def __new__(cls, *args, **options):
        refuse_unknown("ScoringParams", options, cls.__dataclass_fields__, SCORING_HINTS)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_int("mc_num", self.mc_num, 1, 2**20)
        check_seed(self.seed)
        check_choice("mode", self.mode, SCORING_MODES)
        check_real("cfg_scale", self.cfg_scale, 0.0, 1e6)
        check_bool("is_greedy", self.is_greedy)
