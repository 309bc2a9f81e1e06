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


class MoENetwork(Network):
    """LLaDA-MoE and LLaDA2: heads with norms of their own, of which RoPE turns a part, and experts."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, dtype)
        self.routed: list[list[list[int]]] = []  # of each layer's rows the experts, in order

    def hidden(self, tokens: list[int], sees: torch.Tensor, names: dict[str, str]) -> torch.Tensor:
        """Behind the last norm, [T, d]. names: of what the two call differently."""
        config = self.config
        D = config["hidden_size"] // config["num_attention_heads"]
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        part = int(D * config.get("partial_rotary_factor", 1.0))
        x = self.weight(names["embeddings"])[tokens]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            h = self.norm(x, name + "input_layernorm")
            q, k, v = self.heads(h, name, D)
            q = [self.turned(self.norm(one, name + names["q_norm"]), part) for one in q]
            k = [self.turned(self.norm(one, name + names["k_norm"]), part) for one in k]
            outputs = [self.attend(one, k[i // group], v[i // group], sees) for i, one in enumerate(q)]
            x = x + self.times(torch.cat(outputs, dim=-1), name + names["out"])
            h = self.norm(x, name + "post_attention_layernorm")
            if layer < config.get("first_k_dense_replace", 0):
                x = x + self.swiglu(h, name + "mlp")
                continue
            chosen = [self.route(row, name + "mlp.gate") for row in h]
            self.routed.append([[expert for expert, _ in experts] for experts in chosen])
            mixed = torch.zeros_like(x)
            for row, experts in enumerate(chosen):
                for expert, weight in experts:
                    mixed[row] += weight * self.swiglu(h[row], f"{name}mlp.experts.{expert}")
                if config.get("num_shared_experts"):
                    mixed[row] += self.swiglu(h[row], name + "mlp.shared_experts")
            x = x + mixed
        return self.norm(x, "model.norm")


class LLaDAMoENetwork(MoENetwork):
    """arXiv 2509.24389: the softmax over all experts, and the best ones' shares as they are."""

    def heads(self, h: torch.Tensor, name: str, D: int) -> list[tuple[torch.Tensor, ...]]:
        return [self.times(h, f"{name}self_attn.{one}_proj").split(D, dim=-1) for one in "qkv"]

    def route(self, h: torch.Tensor, gate: str) -> list[tuple[int, float]]:
        shares = self.times(h, gate).to(self.wide).softmax(-1)
        best = sorted(range(len(shares)), key=lambda e: (-shares[e].item(), e))[: self.config["num_experts_per_tok"]]
        return [(e, shares[e].to(self.dtype).item()) for e in best]

    def logits(self, tokens: list[int]) -> torch.Tensor:
        names = {"embeddings": "model.embed_tokens", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
        everything = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
        return self.times(self.hidden(tokens, everything, names | {"out": "self_attn.o_proj"}), "lm_head")


class LLaDA2Network(MoENetwork):
    """arXiv 2512.15745: block-causal; the best of the best groups by sigmoid and bias, without the bias weighed."""

    def heads(self, h: torch.Tensor, name: str, D: int) -> list[list[torch.Tensor]]:
        every = self.times(h, name + "attention.query_key_value").split(D, dim=-1)
        q, kv = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        return [every[:q], every[q : q + kv], every[q + kv :]]

    def route(self, h: torch.Tensor, gate: str) -> list[tuple[int, float]]:
        config = self.config
        shares = torch.sigmoid(self.weights[f"{gate}.weight"].to(self.wide) @ h.to(self.wide))
        biased = (shares + self.weights[f"{gate}.expert_bias"].to(self.wide)).tolist()
        groups, per = config["n_group"], len(biased) // config["n_group"]
        totals = [sum(sorted(biased[g * per : (g + 1) * per])[-2:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: (-totals[g], g))[: config["topk_group"]]
        allowed = [e for e in range(len(biased)) if e // per in kept or groups == 1]
        best = sorted(allowed, key=lambda e: (-biased[e], e))[: config["num_experts_per_tok"]]
        whole = sum(shares[e].item() for e in best) + 1e-20 if len(best) > 1 else 1.0
        return [(e, shares[e].item() / whole * config["routed_scaling_factor"]) for e in best]

    def logits(self, tokens: list[int], block: int | None = None) -> torch.Tensor:
        """block: so many positions see each other, and those before; None is all of them."""
        at = torch.arange(len(tokens)) // (block or len(tokens))
        names = {"embeddings": "model.word_embeddings", "out": "attention.dense"}
        names |= {"q_norm": "attention.query_layernorm", "k_norm": "attention.key_layernorm"}
        return self.times(self.hidden(tokens, at[None, :] <= at[:, None], names), "lm_head")


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
