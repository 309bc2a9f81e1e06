"""The two configurations: what the checkpoint is (ModelConfig) and how it is to be served (EngineConfig)."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from blockinfer.checks import check_bool, check_choice, check_int, check_seed, is_finite, shown

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Far beyond any model; a layer's modules take time and memory whatever their size.
_MAX_LAYERS = 10_000

# What the LLaDA model here computes. A checkpoint that says otherwise is refused; one that is silent is taken to agree.
_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False, None),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "quantization_config": (None,),
    "rope": (True,),
    "rope_full_precision": (True,),
    "rope_scaling": (None,),
    "scale_logits": (False, None),
    "sliding_window": (False, None),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a dense LLaDA, named as in its config.json. dtype is the checkpoint's, None where it says none."""

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
    mask_token_id: int | None
    dtype: torch.dtype | None

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> "ModelConfig":
        """Reads a config.json's content; `source` names it in errors.

        Raises ValueError for a missing or impossible size and for a value that the model does not implement.
        """
        for name, allowed in _IMPLEMENTED.items():
            if name in raw and raw[name] not in allowed:
                raise ValueError(f"{source}: {name}={shown(raw[name])} is not implemented, only {allowed[0]!r} is")
        read = _Reader(raw, source)
        n_heads = read.integer("n_heads")
        n_kv_heads = raw.get("n_kv_heads")
        if n_kv_heads is None:
            n_kv_heads = 1 if raw.get("multi_query_attention") else n_heads
        else:
            n_kv_heads = read.integer("n_kv_heads")
        d_model = read.integer("d_model")
        vocab_size = read.integer("vocab_size")
        has_mlp_size = raw.get("mlp_hidden_size") is not None
        config = cls(
            architecture=architecture(raw, source),
            d_model=d_model,
            n_layers=read.integer("n_layers", _MAX_LAYERS),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            mlp_hidden_size=read.integer("mlp_hidden_size") if has_mlp_size else d_model * read.integer("mlp_ratio"),
            vocab_size=vocab_size,
            embedding_size=vocab_size if raw.get("embedding_size") is None else read.integer("embedding_size"),
            max_sequence_length=read.integer("max_sequence_length"),
            rope_theta=read.positive("rope_theta"),
            rms_norm_eps=read.positive("rms_norm_eps"),
            weight_tying=read.boolean("weight_tying"),
            eos_token_ids=read.token_ids("eos_token_id"),
            mask_token_id=read.mask_token_id(),
            dtype=read.dtype(),
        )
        config._check_shapes(source)
        return config

    def _check_shapes(self, source: str) -> None:
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"{source}: d_model={self.d_model} must split into n_heads={self.n_heads} heads of an even size"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{source}: n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.embedding_size < self.vocab_size:
            raise ValueError(f"{source}: embedding_size={self.embedding_size} is below vocab_size={self.vocab_size}")
        for name, ids in (("eos_token_id", self.eos_token_ids), ("mask_token_id", (self.mask_token_id,))):
            for token_id in ids:
                if token_id is not None and token_id >= self.embedding_size:
                    raise ValueError(
                        f"{source}: {name}={shown(token_id)} is outside the {self.embedding_size} embeddings"
                    )


def architecture(raw: Mapping[str, Any], source: str) -> str:
    """The one name of a config's `architectures`; model_type is not used, since LLaDA-MoE shares it."""
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f'{source}: architectures must be a list of one name, as ["LLaDAModelLM"], got {shown(names)}')
    return names[0]


class _Reader:
    """Typed access to config.json, with errors that name the file and the field."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def integer(self, name: str, maximum: int = 2**31 - 1) -> int:
        value = self._present(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.source}: {name} must be a positive integer, got {shown(value)}")
        if value > maximum:
            raise ValueError(f"{self.source}: {name} must be at most {maximum}, got {shown(value)}")
        return value

    def positive(self, name: str) -> float:
        value = self._present(name)
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

    def _present(self, name: str) -> Any:
        if self.raw.get(name) is None:
            raise ValueError(f"{self.source}: {name} is missing")
        return self.raw[name]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of `LLM`, checked. `resolve` fills in what depends on the checkpoint and the machine."""

    model: str | os.PathLike[str]
    dtype: str | torch.dtype
    device: str | torch.device
    load_format: str
    tokenizer: str | os.PathLike[str] | None
    revision: str | None
    mask_token_id: int | None
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    page_size: int
    kv_cache_memory: int | None
    enforce_eager: bool
    cudagraph_capture_sizes: list[int] | tuple[int, ...] | None
    seed: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype):
            check_choice("dtype", self.dtype, ["auto", *DTYPES])
        elif self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        check_choice("load_format", self.load_format, ["auto", "dummy"])
        for name in ("model", "tokenizer", "revision"):
            value = getattr(self, name)
            kinds = str if name == "revision" else str | os.PathLike
            if not (isinstance(value, kinds) and str(value)) and (value is not None or name == "model"):
                raise ValueError(f"{name} must be a folder or a name on the Hub, got {shown(value)}")
        for name in ("max_model_len", "max_num_batched_tokens", "kv_cache_memory"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.mask_token_id is not None:
            check_int("mask_token_id", self.mask_token_id, 0)
        check_bool("enforce_eager", self.enforce_eager)
        self._check_capture_sizes()
        check_seed(self.seed)
        check_int("max_num_seqs", self.max_num_seqs, 1)
        check_int("page_size", self.page_size, 1)

    def _check_capture_sizes(self) -> None:
        sizes = self.cudagraph_capture_sizes
        if sizes is None:
            return
        if not isinstance(sizes, list | tuple) or not sizes:
            raise ValueError(f"cudagraph_capture_sizes must be a list of numbers of rows, got {sizes!r}")
        for size in sizes:
            check_int("every one of cudagraph_capture_sizes", size, 1)
        if self.enforce_eager:
            raise ValueError("cudagraph_capture_sizes are not captured with enforce_eager=True: leave one of them out")

    def resolve(self, model: ModelConfig, tokenizer_mask_id: int | None) -> "EngineConfig":
        """The same with dtype, device, lengths and mask token settled; kv_cache_memory and seed may stay None.

        Raises ValueError where an option disagrees with the checkpoint or the machine.
        """
        device = _device(self.device)
        dtype = DTYPES.get(self.dtype, self.dtype)
        if dtype == "auto":
            dtype = torch.float32 if device.type == "cpu" else model.dtype or torch.bfloat16
        max_model_len = self.max_model_len or model.max_sequence_length
        if max_model_len > model.max_sequence_length:
            raise ValueError(
                f"max_model_len={max_model_len} exceeds the config's max_sequence_length={model.max_sequence_length}"
            )
        batched = self.max_num_batched_tokens or max(8192, max_model_len)
        if batched < max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={batched} must be at least max_model_len={max_model_len}: "
                "a step of one request is never split over forwards"
            )
        return dataclasses.replace(
            self,
            dtype=dtype,
            device=device,
            mask_token_id=self._mask_token_id(model, tokenizer_mask_id),
            max_model_len=max_model_len,
            max_num_batched_tokens=batched,
        )

    def _mask_token_id(self, model: ModelConfig, tokenizer_mask_id: int | None) -> int:
        for mask_id in (self.mask_token_id, model.mask_token_id, tokenizer_mask_id):
            if mask_id is not None:
                if mask_id >= model.embedding_size:
                    raise ValueError(f"mask_token_id={mask_id} is outside the {model.embedding_size} embeddings")
                return mask_id
        raise ValueError(
            "neither the checkpoint's config nor its tokenizer names a mask token; pass mask_token_id "
            "(LLaDA-8B's is 126336)"
        )


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = f"device must be 'auto', 'cpu' or 'cuda', got {shown(device if isinstance(device, str) else str(device))}"
    if not isinstance(device, str | torch.device):
        raise ValueError(wrong)
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(wrong) from error
    if device.type not in ("cpu", "cuda") or device.type == "cpu" and device.index:
        raise ValueError(wrong)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r} was asked for, but this torch ({torch.__version__}) sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r} was asked for, and there are {torch.cuda.device_count()} GPUs")
    return device
