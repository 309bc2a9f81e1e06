"""Writes LLaDA checkpoints with random weights, in the published format, for the tests.

The weights are scaled so that a denoising step is neither a coin toss nor certain: attention is sharp enough that a
position's prediction depends on the others and on their distance, and confidences spread over (0, 1).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def write_checkpoint(
    folder: str | Path,
    *,
    n_layers: int = 2,
    d_model: int = 32,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    mlp_hidden_size: int = 48,
    vocab_size: int = 61,
    embedding_size: int | None = None,
    weight_tying: bool = False,
    mask_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    max_sequence_length: int = 256,
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
    scale: float = 3.0,
    **config_overrides,
) -> Path:
    """Write config.json and safetensors into `folder` and return it.

    By default the special ids stand at the vocabulary's end in LLaDA's order: bos V-6, eos V-5, mask V-4,
    start_header V-3, end_header V-2, eot V-1. `embedding_size` may exceed `vocab_size`. `scale` is about the standard
    deviation of the logits. `config_overrides` only change what config.json says.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    embedding_size = vocab_size if embedding_size is None else embedding_size
    mask_token_id = vocab_size - 4 if mask_token_id is None else mask_token_id
    eos_token_id = vocab_size - 5 if eos_token_id is None else eos_token_id
    config = {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": d_model,
        "embedding_dropout": 0.0,
        "embedding_size": embedding_size,
        "eos_token_id": eos_token_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": mask_token_id,
        "max_sequence_length": max_sequence_length,
        "mlp_hidden_size": mlp_hidden_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "n_layers": n_layers,
        "pad_token_id": eos_token_id if isinstance(eos_token_id, int) else next(iter(eos_token_id), None),
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "torch_dtype": dtype,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": vocab_size,
        "weight_tying": weight_tying,
    }
    kv_size = d_model // n_heads * n_kv_heads
    tensors = random_tensors(n_layers, d_model, kv_size, mlp_hidden_size, embedding_size, weight_tying, seed, scale)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config | config_overrides, indent=2))
    save_shards(folder, tensors, shards)
    return folder


def random_tensors(
    n_layers: int,
    d_model: int,
    kv_size: int,
    mlp_hidden_size: int,
    embedding_size: int,
    weight_tying: bool,
    seed: int,
    scale: float,
) -> dict[str, torch.Tensor]:
    """Every tensor of a LLaDA checkpoint by its published name; matrices are [out, in] with std gain / sqrt(in)."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    def norm() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(d_model, generator=generator)

    tensors = {"model.transformer.wte.weight": matrix(embedding_size, d_model, scale)}
    for layer in range(n_layers):
        block = {
            "attn_norm": norm(),
            "ff_norm": norm(),
            "q_proj": matrix(d_model, d_model, 1.6),
            "k_proj": matrix(kv_size, d_model, 1.6),
            "v_proj": matrix(kv_size, d_model, 1.5),
            "attn_out": matrix(d_model, d_model, 1.5),
            "ff_proj": matrix(mlp_hidden_size, d_model, 1.5),
            "up_proj": matrix(mlp_hidden_size, d_model, 1.5),
            "ff_out": matrix(d_model, mlp_hidden_size, 1.5),
        }
        tensors |= {f"model.transformer.blocks.{layer}.{name}.weight": tensor for name, tensor in block.items()}
    tensors["model.transformer.ln_f.weight"] = norm()
    if not weight_tying:
        tensors["model.transformer.ff_out.weight"] = matrix(embedding_size, d_model, scale)
    return tensors


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """One model.safetensors, or `shards` numbered files with their index, the tensors dealt out in order."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def special_tokens(config: dict) -> dict[str, int]:
    """LLaDA's special tokens with their ids: eos and mask where the config says, the others on the highest free ids."""
    eos = config["eos_token_id"]
    fixed = {"<|endoftext|>": eos if isinstance(eos, int) else eos[0], "<|mdm_mask|>": config["mask_token_id"]}
    free = [i for i in reversed(range(config["vocab_size"])) if i not in fixed.values()]
    others = ["<|eot_id|>", "<|end_header_id|>", "<|start_header_id|>", "<|startoftext|>"]
    return dict(zip(others, free, strict=False)) | fixed


def write_tokenizer(folder: str | Path) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json for the checkpoint in `folder`; return its special tokens' ids.

    Byte level without merges: as many bytes as fit the vocabulary, lower-case letters first; others are dropped.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    special = special_tokens(config)
    # Ġ and Ċ are the byte-level names of space and newline
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    alphabet = sorted(alphabet, key=lambda c: (c not in "ĠĊ", not c.isascii(), not c.islower(), c))
    free = [i for i in range(config["vocab_size"]) if i not in special.values()]
    vocabulary = dict(zip(alphabet, free, strict=False)) | special
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(special, key=special.get))
    bos = "<|startoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $0", special_tokens=[(bos, special[bos])])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_sequence_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return special
