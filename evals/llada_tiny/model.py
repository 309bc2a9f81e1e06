"""A compact LLaDA for training: the published architecture, tensor names and config, on rows of packed documents."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evals.files import replacing, write_output


@dataclass(frozen=True)
class Shape:
    """The sizes and ids of a model; names as in the published config.json."""

    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    mask_token_id: int
    d_model: int = 256
    n_layers: int = 8
    n_heads: int = 4
    mlp_hidden_size: int = 640
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    max_sequence_length: int = 1024


class Norm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.d_model))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Half-rotation RoPE. x [B, H, L, D], cos_sin [B, 1, L, D], the cosines first; computed in float32 or better."""
    a, b = x.to(cos_sin.dtype).chunk(2, -1)
    cos, sin = cos_sin.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, h = shape.d_model, shape.mlp_hidden_size
        self.n_heads = shape.n_heads
        self.attn_norm, self.ff_norm = Norm(shape), Norm(shape)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.ff_proj, self.up_proj = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False)
        self.ff_out = nn.Linear(h, d, bias=False)

    def forward(self, x: Tensor, cos_sin: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, d]; bias [B, 1, L, L], 0 where a query sees a key and -inf elsewhere."""
        B, L, d = x.shape
        y = self.attn_norm(x)
        q, k, v = (p(y).view(B, L, self.n_heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q, cos_sin), rotate(k, cos_sin), v, attn_mask=bias.to(q.dtype))
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, L, d))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))


class TinyLLaDA(nn.Module):
    """Tied embeddings, no biases. Module names give the published tensor names under `model.`"""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.vocab_size, shape.d_model),
                "blocks": nn.ModuleList(Block(shape) for _ in range(shape.n_layers)),
                "ln_f": Norm(shape),
            }
        )
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                last = name.endswith(("attn_out.weight", "blocks.ff_out.weight")) or ".ff_out." in name
                nn.init.normal_(weight, std=0.02 / (2 * shape.n_layers) ** 0.5 if last else 0.02)
        head_dim = shape.d_model // shape.n_heads
        frequencies = shape.rope_theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.arange(shape.max_sequence_length).float()[:, None] * frequencies
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("cos_sin", torch.cat([angles.cos(), angles.sin()], -1), persistent=False)

    def hidden(self, tokens: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
        """Final hidden states [B, L, d] of tokens [B, L] at positions [B, L] within their documents."""
        # looked up: torch.compile would take sine and cosine anew in every layer
        cos_sin = self.cos_sin[positions][:, None]
        x = self.transformer["wte"](tokens)
        for block in self.transformer["blocks"]:
            x = block(x, cos_sin, bias)
        return self.transformer["ln_f"](x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.transformer["wte"].weight)


def attention_bias(documents: Tensor, segments: Tensor) -> Tensor:
    """[B, 1, L, L]: a position sees its own document's segments up to its own, in both directions within one."""
    same = documents[:, :, None] == documents[:, None, :]
    seen = same & (segments[:, None, :] <= segments[:, :, None])
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))[:, None]


def config_json(shape: Shape) -> dict:
    """config.json with every field of the published LLaDA-8B's."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shape.d_model,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_heads,
        "mlp_ratio": 4,
        "mlp_hidden_size": shape.mlp_hidden_size,
        "vocab_size": shape.vocab_size,
        "embedding_size": shape.vocab_size,
        "max_sequence_length": shape.max_sequence_length,
        "rope": True,
        "rope_theta": shape.rope_theta,
        "rope_full_precision": True,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "rms_norm_eps": shape.rms_norm_eps,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "block_type": "llama",
        "block_group_size": 1,
        "activation_type": "silu",
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "weight_tying": True,
        "scale_logits": False,
        "input_emb_norm": False,
        "multi_query_attention": None,
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "flash_attention": False,
        "use_cache": False,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "init_cutoff_factor": None,
        "precision": "amp_bf16",
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": shape.eos_token_id,
        "pad_token_id": shape.eos_token_id,
        "mask_token_id": shape.mask_token_id,
        "torch_dtype": "bfloat16",
    }


def export(model: TinyLLaDA, folder: Path) -> None:
    """Write config.json and bf16 model.safetensors in the published format."""
    tensors = {f"model.{name}": weight.detach().cpu().bfloat16() for name, weight in model.named_parameters()}
    with replacing(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    write_output(folder / "config.json", json.dumps(config_json(model.shape), indent=2) + "\n")


def load(folder: Path) -> TinyLLaDA:
    """The exported model in float32, for this folder's own evaluation."""
    config = json.loads((folder / "config.json").read_text())
    model = TinyLLaDA(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()})
    return model
