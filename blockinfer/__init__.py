"""BlockInfer: block-wise diffusion decoding for LLaDA, with paged attention and a paged KV cache."""

from blockinfer.llm import LLM
from blockinfer.outputs import RequestOutput
from blockinfer.sampling_params import SamplingParams

__all__ = ["LLM", "RequestOutput", "SamplingParams"]
