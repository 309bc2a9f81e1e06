"""How a checkpoint is served; its shape is in `model_config.ModelConfig`."""

import dataclasses
import os
from dataclasses import dataclass

import torch

from blockinfer.checks import check_bool, check_choice, check_int, check_seed, shown
from blockinfer.model_config import DTYPES, ModelConfig
from blockinfer.quantization import QUANTIZATIONS


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of `LLM`, checked. `resolve` fills in what depends on the checkpoint and the machine."""

    model: str | os.PathLike[str]
    dtype: str | torch.dtype
    quantization: str | None
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
    tensor_parallel_size: int
    enforce_eager: bool
    cudagraph_capture_sizes: list[int] | tuple[int, ...] | None
    seed: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype):
            check_choice("dtype", self.dtype, ["auto", *DTYPES])
        elif self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
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
        check_int("tensor_parallel_size", self.tensor_parallel_size, 1)

    def _check_capture_sizes(self) -> None:
        sizes = self.cudagraph_capture_sizes
        if sizes is None:
            return
        if not isinstance(sizes, list | tuple) or not sizes:
            raise ValueError(f"cudagraph_capture_sizes must be a list of numbers of rows, got {shown(sizes)}")
        for size in sizes:
            check_int("every one of cudagraph_capture_sizes", size, 1)
        if self.enforce_eager:
            raise ValueError("cudagraph_capture_sizes are not captured with enforce_eager=True: leave one of them out")

    def resolve(self, model: ModelConfig, tokenizer_mask_id: int | None) -> "EngineConfig":
        """A copy with dtype, quantization, device, lengths and mask token settled; kv_cache_memory and seed may stay
        None.

        Raises ValueError if an option disagrees with the checkpoint or the machine.
        """
        device = find_device(self.device)
        dtype = DTYPES.get(self.dtype, self.dtype)
        if dtype == "auto":
            dtype = torch.float32 if device.type == "cpu" else model.dtype or torch.bfloat16
        max_model_len = self.max_model_len or model.max_sequence_length
        if max_model_len > model.max_sequence_length:
            raise ValueError(
                f"max_model_len={max_model_len} exceeds the {model.max_sequence_length} positions of the model's config"
            )
        batched = self.max_num_batched_tokens or max(8192, max_model_len)
        if batched < max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={batched} must be at least max_model_len={max_model_len}: "
                "a step of one request is never split over forwards"
            )
        beyond = [size for size in self.cudagraph_capture_sizes or () if size > batched]
        if beyond:
            raise ValueError(
                f"cudagraph_capture_sizes {shown(beyond)} are more rows than max_num_batched_tokens={batched}"
            )
        return dataclasses.replace(
            self,
            dtype=dtype,
            quantization=self.quantization or ("fp8" if model.quantization else None),
            device=device,
            mask_token_id=self._mask_token_id(model, tokenizer_mask_id),
            max_model_len=max_model_len,
            max_num_batched_tokens=batched,
        )

    def _mask_token_id(self, model: ModelConfig, tokenizer_mask_id: int | None) -> int:
        named = {model.mask_token_id, tokenizer_mask_id} - {None}
        if self.mask_token_id is None and len(named) > 1:
            raise ValueError(
                f"the config's mask_token_id={model.mask_token_id} is not the tokenizer's mask token, which is "
                f"{tokenizer_mask_id}; pass mask_token_id to say which it is"
            )
        for mask_id in (self.mask_token_id, model.mask_token_id, tokenizer_mask_id, model.usual_mask_token_id):
            if mask_id is not None:
                if mask_id >= model.embedding_size:
                    raise ValueError(f"mask_token_id={mask_id} is outside the {model.embedding_size} embeddings")
                return mask_id
        raise ValueError(
            "neither the checkpoint's config nor its tokenizer names a mask token; pass mask_token_id "
            "(LLaDA-8B's is 126336)"
        )


def find_device(device: str | torch.device) -> torch.device:
    """Raises ValueError if the device does not exist."""
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
