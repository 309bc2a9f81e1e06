"""Which class serves which checkpoint, by `architectures` in its config, and published shapes by name."""

from collections.abc import Mapping
from typing import Any

from blockinfer.checks import shown
from blockinfer.model_config import ModelConfig, architecture
from blockinfer.models.illada import ILLADA_8B, ILLaDA
from blockinfer.models.llada import LLaDA
from blockinfer.models.llada2 import LLADA2_MINI, LLaDA2
from blockinfer.models.llada_config import LLADA_8B
from blockinfer.models.llada_moe import LLADA_MOE_7B, LLaDAMoE
from blockinfer.models.published import TensorGroup
from blockinfer.models.transformer import Transformer

MODELS: dict[str, type[Transformer]] = {
    "LLaDAModelLM": LLaDA,
    "ILLaDAForCausalLM": ILLaDA,
    "LLaDAMoEModelLM": LLaDAMoE,
    # the base model
    "LLaDAMoEModel": LLaDAMoE,
    "LLaDA2MoeModelLM": LLaDA2,
}

# Published configs, for random weights of their shapes (load_format="dummy").
SHAPES: dict[str, dict[str, Any]] = {
    "llada-8b": LLADA_8B,
    "illada-8b": ILLADA_8B,
    "llada-moe-7b": LLADA_MOE_7B,
    "llada2-mini": LLADA2_MINI,
}


def model_class(name: str, source: str) -> type[Transformer]:
    """Raises ValueError for an architecture that is not implemented, naming those that are."""
    if name not in MODELS:
        # no nearest name: checkpoints hardly mistype it, and LLaDA's relatives differ in one syllable
        raise ValueError(f"{source}: architecture {shown(name)} is not implemented, only {', '.join(MODELS)} are")
    return MODELS[name]


def read_model_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """A config.json's content, by its family; `source` names it in errors. Raises ValueError as `read_config` does."""
    return model_class(architecture(raw, source), source).read_config(raw, source)


def published(config: ModelConfig) -> list[TensorGroup]:
    """The tensors of a checkpoint with this config."""
    return model_class(config.architecture, "").published(config)
