"""Weights into a model's parameters: from safetensors, every tensor accounted for, or random."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from blockinfer.models.llada import LLaDA

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_weights(model: LLaDA, folder: Path) -> None:
    """Fills the model from `folder`'s safetensors, converting to the model's dtype.

    Raises ValueError when a file cannot be read, a shard is missing, or a tensor is missing, unexpected, misshapen, not
    floating point or not finite in the model's dtype; the message names the files and tensors.
    """
    wanted = model.checkpoint_tensors()
    holders = _tensor_files(folder)
    problems = _named("missing", wanted.keys() - holders.keys()) + _named("unexpected", holders.keys() - wanted.keys())
    for name in sorted(wanted.keys() & holders.keys()):
        path, shape, dtype = holders[name]
        if shape != list(wanted[name].shape):
            problems.append(f"{name} in {path.name} has shape {shape}, the config asks for {list(wanted[name].shape)}")
        elif dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} in {path.name} has dtype {dtype}, which is not a plain floating point type")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{folder}: the weights do not fit the config: {shown}")
    for path in sorted({path for path, _, _ in holders.values()}):
        with _open(path) as shard:
            for name in shard.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                wanted[name].copy_(shard.get_tensor(name))
                if not wanted[name].isfinite().all():
                    raise ValueError(f"{path}: {name} has values that are NaN or infinite in {wanted[name].dtype}")


def randomize(model: LLaDA, seed: int) -> None:
    """Normal weights of deviation 0.02, norms 1: the published shape's speed without its weights."""
    generator = torch.Generator(device=model.wte.device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)


def _tensor_files(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """name -> (file, shape, safetensors dtype) of every tensor of the checkpoint."""
    index = folder / _INDEX
    if index.is_file():
        weight_map = _weight_map(index)
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    elif (folder / _SINGLE).is_file():
        weight_map, paths = None, [folder / _SINGLE]
    else:
        raise ValueError(f"{folder}: there is neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints are read")
    holders: dict[str, tuple[Path, list[int], str]] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: this shard is named in {_INDEX}, but there is no such file")
        with _open(path) as shard:
            for name in shard.keys():  # noqa: SIM118
                if name in holders:
                    raise ValueError(f"{path}: tensor {name} is in {holders[name][0].name} too")
                entry = shard.get_slice(name)
                holders[name] = (path, entry.get_shape(), entry.get_dtype())
    for name, file in (weight_map or {}).items():
        if name not in holders:
            raise ValueError(f"{folder / file}: {_INDEX} promises tensor {name} here, but it is not in the file")
    return holders


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index with a weight_map: {error!r}") from error


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file (truncated or damaged?): {error}") from error


def _named(what: str, names: set[str]) -> list[str]:
    shown = sorted(names)
    return [f"{len(shown)} {what}: {', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}"] if shown else []
