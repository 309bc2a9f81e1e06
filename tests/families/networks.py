"""The relatives' networks, plain: from a checkpoint's files to logits, a head and an expert at a time, nothing shared
with the engine.

Every dtype is the checkpoint's own but where `dtype` says otherwise; intermediate results are rounded where the
published models round them.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


class Network:
    """What they have in common: weights by name, RMSNorm, RoPE and attention of one head."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weights: dict[str, torch.Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            self.weights |= load_file(file)

    def weight(self, name: str) -> torch.Tensor:
        return self.weights[f"{name}.weight"].to(self.dtype)

    def times(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weight(name).T

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        wide = x.to(self.wide)
        root = torch.sqrt(wide.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.weight(name) * (wide / root).to(self.dtype)

    def turned(self, x: torch.Tensor, turned: int) -> torch.Tensor:
        """x [T, D]: of its first `turned` dimensions the pairs (j, j + turned / 2), by an angle of position *
        theta**(-2j / turned), which is computed in float32 at least; all else in the network's dtype."""
        out, half = x.clone(), turned // 2
        positions = torch.arange(len(x)).to(self.wide)
        for j in range(half):
            angle = positions * (1 / torch.tensor(self.config["rope_theta"]).to(self.wide) ** (2 * j / turned))
            cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
            out[:, j] = x[:, j] * cos - x[:, j + half] * sin
            out[:, j + half] = x[:, j + half] * cos + x[:, j] * sin
        return out

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        """One head: q, k, v [T, D]; sees [T, T]: which keys each query attends to."""
        scores = (q @ k.T / math.sqrt(q.shape[1])).to(self.wide)
        return scores.masked_fill(~sees, -torch.inf).softmax(-1).to(self.dtype) @ v

    def swiglu(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gate = self.times(x, f"{name}.gate_proj")
        return self.times(gate * torch.sigmoid(gate) * self.times(x, f"{name}.up_proj"), f"{name}.down_proj")


class ILLaDANetwork(Network):
    """arXiv 2606.25331: Llama's layer, in which every position sees every other."""

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[T, vocab_size]."""
        config, T = self.config, len(tokens)
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        D = config["hidden_size"] // heads
        everything = torch.ones(T, T, dtype=torch.bool)
        x = self.weight("model.embed_tokens")[tokens]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            h = self.norm(x, name + "input_layernorm")
            q, k, v = (self.times(h, f"{name}self_attn.{one}_proj").split(D, dim=-1) for one in "qkv")
            shared = [head // (heads // kv_heads) for head in range(heads)]
            outputs = [
                self.attend(self.turned(q[head], D), self.turned(k[of], D), v[of], everything)
                for head, of in enumerate(shared)
            ]
            x = x + self.times(torch.cat(outputs, dim=-1), name + "self_attn.o_proj")
            x = x + self.swiglu(self.norm(x, name + "post_attention_layernorm"), name + "mlp")
        head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
        return self.times(self.norm(x, "model.norm"), head)
