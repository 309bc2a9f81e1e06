"""The checkpoint's own modelling code as a baseline, run through transformers under this engine's loop.

The engine schedules, predicts, unmasks and counts as it does for `vanilla`; only the forward is the checkpoint's: the
whole canvas of one request, without a cache. So the ratio to `vanilla` at batch size 1 is the gain of the engine's own
model and kernels, and their tokens should agree.
"""

import dataclasses

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from blockinfer import LLM
from blockinfer.config import ModelConfig
from blockinfer.engine.engine import Engine
from blockinfer.kernels.ranks import ALONE


class RemoteCodeModel(nn.Module):
    """A transformers model in place of the engine's, for one canvas at a time."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.config, self.ranks = config, ALONE
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads

    def forward(self, token_ids: torch.Tensor, *others: object) -> None:
        """token_ids [T] of a whole canvas; its logits are kept for `logits`. No other argument is used."""
        self.made = self.model(input_ids=token_ids[None]).logits[0]

    def logits(self, attended: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """rows [N] of that canvas -> [N, embedding_size]. The other arguments are not used."""
        return self.made[rows]


class ReferenceLLM(LLM):
    """`LLM` with the modelling code that `llm`'s checkpoint brings, one request at a time, for mode `vanilla` alone.

    Runs that code. Raises ValueError if the checkpoint brings none, or if it does not load, saying which transformers
    it was saved with.
    """

    def __init__(self, llm: LLM) -> None:
        self.model_config, self.tokenizer = llm.model_config, llm.tokenizer
        # the scheduler wants pages for one canvas, to which nothing is written
        self.config = dataclasses.replace(llm.config, max_num_seqs=1, enforce_eager=True, cudagraph_capture_sizes=None)
        model = _load(str(llm.config.model), llm.config.dtype).to(llm.config.device).eval()
        self._engine = Engine(RemoteCodeModel(model, llm.model_config), self.config, llm.tokenizer)


def _load(name: str, dtype: torch.dtype) -> nn.Module:
    raw, _ = PretrainedConfig.get_config_dict(name)
    classes = [kind for kind in ("AutoModel", "AutoModelForCausalLM") if kind in raw.get("auto_map", {})]
    if not classes:
        raise ValueError(f"--reference-impl: {name} brings no modelling code: its config.json has no auto_map for it")
    auto = getattr(transformers, classes[0])
    saved_with = raw.get("transformers_version", "a version that its config.json does not name")
    try:
        return auto.from_pretrained(name, trust_remote_code=True, dtype=dtype)
    except Exception as error:
        raise ValueError(
            f"--reference-impl: the modelling code of {name} does not load with transformers "
            f"{transformers.__version__}; it was saved with {saved_with}: "
            f"{type(error).__name__}: {error}"
        ) from error
