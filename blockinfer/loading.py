"""From a checkpoint to a network that can run."""

import dataclasses
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from blockinfer.checkpoint import load_tokenizer, read_config, read_end_token_ids
from blockinfer.checks import reason
from blockinfer.config import EngineConfig, ModelConfig
from blockinfer.kernels.ranks import ALONE, Ranks
from blockinfer.memory import check_fits
from blockinfer.models.registry import model_class, read_model_config
from blockinfer.models.transformer import Transformer
from blockinfer.weights import StoredTensor, find_weights, load_weights, randomize


class Loaded(NamedTuple):
    """A network with its weights. config: resolved, with nothing left "auto". tokenizer: None if there is none."""

    network: Transformer
    model_config: ModelConfig
    config: EngineConfig
    tokenizer: PreTrainedTokenizerBase | None


class Prepared(NamedTuple):
    """The input of `load`: a checkpoint that was found and checked. stored: None for random weights."""

    make_model: type[Transformer]
    stored: dict[str, StoredTensor] | None
    model_config: ModelConfig
    config: EngineConfig
    tokenizer: PreTrainedTokenizerBase | None


def prepare(config: EngineConfig) -> Prepared:
    """Everything is checked before any memory is taken. Raises ValueError as `LLM` does."""
    folder, raw, source = read_config(config)
    model_config = read_model_config(raw, source)
    make_model = model_class(model_config.architecture, source)
    if config.tensor_parallel_size > 1 and not make_model.IS_SHARED:
        name = model_config.architecture
        raise ValueError(f"{source}: tensor_parallel_size is not implemented for {name}; leave it at 1")
    model_config.check_shares(config.tensor_parallel_size, source)
    tokenizer = load_tokenizer(config, folder, model_config.vocab_size)
    ends = read_end_token_ids(folder, model_config.embedding_size) if config.load_format == "auto" else ()
    eos = model_config.eos_token_ids or _eos_token_ids(tokenizer, model_config.usual_eos_token_id) or ends
    model_config = dataclasses.replace(model_config, eos_token_ids=eos, end_token_ids=ends)
    resolved = config.resolve(model_config, getattr(tokenizer, "mask_token_id", None))
    if resolved.quantization and not make_model.QUANTIZES:
        name, leave = model_config.architecture, "; leave it out" * (config.quantization is not None)
        raise ValueError(f"{source}: quantization={resolved.quantization!r} is not implemented for {name}{leave}")
    stored = find_weights(model_config, folder) if config.load_format == "auto" else None
    check_fits(model_config, resolved)
    return Prepared(make_model, stored, model_config, resolved, tokenizer)


def _eos_token_ids(tokenizer: PreTrainedTokenizerBase | None, usual: int | None) -> tuple[int, ...]:
    """The tokenizer's EOS, and the family's usual one unless the tokenizer names an EOS but lacks that token."""
    own = getattr(tokenizer, "eos_token_id", None)
    if usual is not None and own is not None and tokenizer.convert_ids_to_tokens(usual) is None:
        usual = None
    return tuple(token_id for token_id in dict.fromkeys((own, usual)) if token_id is not None)


def load(prepared: Prepared, ranks: Ranks = ALONE) -> Loaded:
    """The network, or this rank's share of it. Raises ValueError as `LLM` does."""
    make_model, stored, model_config, config, tokenizer = prepared
    with torch.inference_mode():
        network = _allocate(make_model, model_config, config, ranks)
        if stored is None:
            randomize(network, config.seed or 0)
        else:
            load_weights(network, stored)
    return Loaded(network, model_config, config, tokenizer)


def _allocate(
    make_model: type[Transformer], model_config: ModelConfig, config: EngineConfig, ranks: Ranks
) -> Transformer:
    options = {"quantization": config.quantization} if config.quantization else {}
    options |= {"ranks": ranks} if make_model.IS_SHARED else {}
    try:
        return make_model(model_config, config.dtype, config.device, config.max_model_len, **options)
    except RuntimeError as error:  # torch's own error, if memory that was free has been taken
        raise ValueError(f"{config.model} cannot be allocated on {config.device}: {reason(error)}") from error
