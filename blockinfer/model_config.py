"""A checkpoint's shape, as the engine sees it for every family, and the reading of a config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from blockinfer.checks import is_finite, shown
from blockinfer.quantization import StoredQuantization

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Far beyond any model: even a tiny layer's modules take time and memory.
MAX_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a dense network, named as in LLaDA's config.json; families that need more fields subclass it.

    embedding_size: rows of the embeddings and of the head; the first vocab_size are tokens. eos_token_ids: empty if
    the config names none. end_token_ids: further tokens that end an answer, as generation_config.json names them.
    usual_mask_token_id, usual_eos_token_id: the family's, for a checkpoint whose tokenizer names none either.
    block_length: of a block-causal network, whose positions see no later block, counted from position 0; None if
    all positions see each other. dtype: the checkpoint's, None if it names none. quantization: how its layers'
    matrices are stored, None if plain.
    """

    architecture: str
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_size: int
    embedding_size: int
    max_sequence_length: int
    rope_theta: float
    rms_norm_eps: float
    weight_tying: bool
    eos_token_ids: tuple[int, ...]
    end_token_ids: tuple[int, ...] = ()
    mask_token_id: int | None
    usual_mask_token_id: int | None = None
    usual_eos_token_id: int | None = None
    block_length: int | None = None
    dtype: torch.dtype | None
    quantization: StoredQuantization | None = None

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of a head RoPE rotates."""
        return self.head_dim

    @property
    def step_width(self) -> int:
        """Numbers per row at a layer's peak: gate and up, their product, and a few hidden states."""
        return 3 * self.mlp_hidden_size + 10 * self.d_model

    @property
    def mlp_elements(self) -> float:
        """MLP weights that a row is multiplied by in a layer, averaged over the layers."""
        return 3 * self.d_model * self.mlp_hidden_size

    def check_shares(self, ranks: int, source: str) -> None:
        """Raises ValueError if heads, MLP and vocabulary cannot be split equally over `ranks`."""
        sizes = {n: getattr(self, n) for n in ("n_heads", "n_kv_heads", "mlp_hidden_size", "embedding_size")}
        uneven = [f"{name}={size}" for name, size in sizes.items() if size % ranks]
        if uneven:
            largest = math.gcd(*sizes.values())
            possible = [str(n) for n in range(1, min(largest, 64) + 1) if largest % n == 0]
            raise ValueError(
                f"{source}: tensor_parallel_size={ranks} does not divide {' and '.join(uneven)}; this model can be "
                f"shared by {', '.join(possible)}"
            )


def architecture(raw: Mapping[str, Any], source: str) -> str:
    """The one name of a config's `architectures`; model_type is not used, since LLaDA-MoE shares it."""
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f'{source}: architectures must be a list of one name, as ["LLaDAModelLM"], got {shown(names)}')
    return names[0]


class ConfigReader:
    """Typed access to config.json, with errors that name the file and the field."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def refuse_others(self, implemented: Mapping[str, tuple[object, ...]]) -> None:
        """Raises ValueError for a field whose value is not among `implemented`. A missing field is accepted."""
        for name, allowed in implemented.items():
            if name in self.raw and self.raw[name] not in allowed:
                value = shown(self.raw[name])
                raise ValueError(f"{self.source}: {name}={value} is not implemented, only {allowed[0]!r} is")

    def integer(self, name: str, maximum: int = 2**31 - 1, *, default: int | None = None, minimum: int = 1) -> int:
        value = self._present(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            kind = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
            raise ValueError(f"{self.source}: {name} must be {kind}, got {shown(value)}")
        if value > maximum:
            raise ValueError(f"{self.source}: {name} must be at most {maximum}, got {shown(value)}")
        return value

    def positive(self, name: str, *, default: float | None = None) -> float:
        value = self._present(name, default)
        if not is_finite(value) or value <= 0:
            raise ValueError(f"{self.source}: {name} must be a positive number, got {shown(value)}")
        return float(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(
                f"{self.source}: {name} must be a token id (or a list of them for EOS), got {shown(value)}"
            )
        return tuple(ids)

    def mask_token_id(self) -> int | None:
        if isinstance(self.raw.get("mask_token_id"), list):
            raise ValueError(
                f"{self.source}: mask_token_id must be one token id, got {shown(self.raw['mask_token_id'])}"
            )
        return next(iter(self.token_ids("mask_token_id")), None)

    def boolean(self, name: str) -> bool:
        value = False if self.raw.get(name) is None else self.raw[name]
        if not isinstance(value, bool):
            raise ValueError(f"{self.source}: {name} must be true or false, got {shown(value)}")
        return value

    def dtype(self) -> torch.dtype | None:
        name = self.raw.get("dtype", self.raw.get("torch_dtype"))
        if name is not None and (not isinstance(name, str) or name not in DTYPES):
            raise ValueError(f"{self.source}: dtype must be one of {', '.join(DTYPES)}, got {shown(name)}")
        return DTYPES[name] if name is not None else None

    def _present(self, name: str, default: float | None) -> Any:
        value = default if self.raw.get(name) is None else self.raw[name]
        if value is None:
            raise ValueError(f"{self.source}: {name} is missing")
        return value


def check_heads(source: str, names: tuple[str, str, str], d_model: int, n_heads: int, n_kv_heads: int) -> None:
    """names: the config's names of these three."""
    width, heads, kv_heads = names
    if d_model % n_heads or d_model // n_heads % 2:
        raise ValueError(f"{source}: {width}={d_model} must split into {heads}={n_heads} heads of an even size")
    if n_heads % n_kv_heads:
        raise ValueError(f"{source}: {heads}={n_heads} is not a multiple of {kv_heads}={n_kv_heads}")


def check_tokens(source: str, config: ModelConfig) -> None:
    """The special tokens must have embeddings."""
    mask_ids = () if config.mask_token_id is None else (config.mask_token_id,)
    for name, ids in (("eos_token_id", config.eos_token_ids), ("mask_token_id", mask_ids)):
        check_embedded(source, name, ids, config.embedding_size)


def check_embedded(source: str, name: str, token_ids: tuple[int, ...], embeddings: int) -> None:
    for token_id in token_ids:
        if token_id >= embeddings:
            raise ValueError(f"{source}: {name}={shown(token_id)} is outside the {embeddings} embeddings")


def if_embedded(token_id: int, embeddings: int) -> int | None:
    """A family's usual token id; None if a model with this many embeddings does not have it."""
    return token_id if token_id < embeddings else None
