"""BlockInfer: block-wise diffusion decoding for LLaDA, with paged attention and a paged KV cache."""

from blockinfer.llm import LLM
from blockinfer.outputs import ChoiceOutput, RequestOutput, ScoreOutput
from blockinfer.sampling_params import SamplingParams
from blockinfer.scoring_params import ScoringParams

__all__ = ["LLM", "ChoiceOutput", "RequestOutput", "SamplingParams", "ScoreOutput", "ScoringParams"]
