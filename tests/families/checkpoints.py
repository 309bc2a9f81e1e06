"""Writes checkpoints of LLaDA's relatives, with random weights, in their published formats."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.checkpoints import save_shards

ILLADA = {
    "architectures": ["ILLaDAForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM"},
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": None,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "illada",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.57.1",
    "vocab_size": 61,
}


class Draw:
    """Random matrices [out, in] of deviation gain / sqrt(in), and norms about 1."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, rows: int, columns: int, gain: float = 1.5) -> torch.Tensor:
        return torch.randn(rows, columns, generator=self.generator) * gain / columns**0.5

    def norm(self, size: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(size, generator=self.generator)


def illada_tensors(config: dict, seed: int) -> dict[str, torch.Tensor]:
    draw, d, mlp = Draw(seed), config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors = {"model.embed_tokens.weight": draw.matrix(config["vocab_size"], d, 3.0)}
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": draw.norm(d), "post_attention_layernorm": draw.norm(d)}
        layer |= {f"self_attn.{x}_proj": draw.matrix(rows, d) for x, rows in (("q", d), ("k", kv), ("v", kv), ("o", d))}
        layer |= {"mlp.gate_proj": draw.matrix(mlp, d), "mlp.up_proj": draw.matrix(mlp, d)}
        layer["mlp.down_proj"] = draw.matrix(d, mlp)
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    tensors["model.norm.weight"] = draw.norm(d)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], d, 3.0)
    return tensors


TENSORS = {"ILLaDAForCausalLM": illada_tensors}


def write_family(
    folder: str | Path, config: dict, *, shards: int = 1, seed: int = 0, says: dict | None = None, **changes
) -> Path:
    """The config with `changes`, and tensors of its torch_dtype that belong to it. says: what config.json alone says;
    a field of None is null there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config | changes
    dtype = getattr(torch, config.get("torch_dtype") or config["dtype"])
    tensors = TENSORS[config["architectures"][0]](config, seed)
    tensors = {name: tensor if name.endswith("expert_bias") else tensor.to(dtype) for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config | (says or {}), indent=2))
    save_shards(folder, tensors, shards)
    return folder


def write_tokenizer(folder: Path, special: dict[str, int], size: int, **settings) -> None:
    """A byte-level tokenizer without merges of `size` tokens, these special ones among them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (c not in "ĠĊ", not c.isascii(), c))
    free = [i for i in range(size) if i not in special.values()]
    vocabulary = dict(zip(alphabet, free, strict=False)) | special
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(special, key=special.get))
    tokenizer.save(str(folder / "tokenizer.json"))
    known = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(known | settings))
