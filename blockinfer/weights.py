"""Loading a model's parameters: from safetensors, with every tensor accounted for, or random."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from blockinfer.checks import reason, shown
from blockinfer.extras import check_harmless, harmless_shape
from blockinfer.files import is_file, is_plain_name, read_json
from blockinfer.kernels.quantize import QuantizedWeight
from blockinfer.model_config import ModelConfig
from blockinfer.models.published import TensorGroup
from blockinfer.models.registry import model_class, published
from blockinfer.models.transformer import Transformer

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint; dtype as safetensors writes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def find_weights(config: ModelConfig, folder: Path) -> dict[str, StoredTensor]:
    """The tensors by name in `folder`'s safetensors: those that the config asks for, with the scales of quantised ones,
    and those that may prove redundant (`extras`). Reads only the files' headers and builds nothing.

    Raises ValueError if a file cannot be read, a shard is missing, or a tensor is missing, unexpected, misshapen or of
    an unexpected dtype; the message names the files and tensors.
    """
    stored = _stored_tensors(folder)
    if not stored:
        raise ValueError(f"{folder}: its safetensors hold no tensors (an index that names none, or an empty file)")
    groups = published(config)
    for group in groups:
        # a few missing tensors are named below; this many would take too much memory to list
        if group.number > 10 * len(stored):
            raise ValueError(f"{folder}: the config asks for {group.asked}, and there are {len(stored)} tensors")
    wanted = dict(tensor for group in groups for tensor in group.tensors())
    # an empty tensor holds nothing: LLaDA2's class stores a shared expert of width 0 where there is none
    stored = {name: tensor for name, tensor in stored.items() if name in wanted or 0 not in tensor.shape}
    scales = _scales(config, groups, stored)
    quantized = {name.removesuffix(config.quantization.suffix) for name in scales} if config.quantization else set()
    problems = _named("missing", (wanted.keys() | scales.keys()) - stored.keys())
    extras = ((name, harmless_shape(name, config)) for name in stored.keys() - wanted.keys() - scales.keys())
    wanted |= {name: shape for name, shape in extras if shape is not None}
    allowed = {name: (shape,) for name, shape in wanted.items()} | scales
    problems += _named("unexpected", stored.keys() - allowed.keys())
    for name in sorted(allowed.keys() & stored.keys()):
        path, shape, dtype = stored[name]
        if shape not in allowed[name]:
            asked = " or ".join(str(list(shape)) for shape in allowed[name])
            problems.append(f"{name} in {path.name} has shape {list(shape)}, the config asks for {asked}")
        elif name in quantized and dtype != "F8_E4M3":
            problems.append(
                f"{name} in {path.name} has dtype {dtype}, and its layer is quantised by the config: F8_E4M3"
            )
        elif name not in quantized and dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} in {path.name} has dtype {dtype}, which is not a plain floating point type")
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{folder}: the weights do not fit the config: {listed}")
    return stored


def load_weights(model: Transformer, stored: dict[str, StoredTensor]) -> None:
    """Fills the model with what `find_weights` found, one tensor at a time, converting to the model's dtype or
    quantising.

    Raises ValueError if a tensor is not finite in the model's dtype, if an extra tensor would change the results, or if
    a file cannot be read after all.
    """
    wanted, quantization, scales = model.checkpoint_tensors(), model.config.quantization, set()
    for path in sorted({tensor.path for tensor in stored.values()}):
        names = [name for name, tensor in stored.items() if tensor.path == path and name in wanted]
        shares = [_share(stored[name].shape, wanted[name].shape, model.ranks.rank) for name in names]
        for name, share, tensor in zip(names, shares, _read(path, names, shares), strict=True):
            target, scale = wanted[name], quantization and quantization.scale_name(name)
            if scale in stored:
                scales.add(scale)
                quantization.load(target, tensor, *_read(stored[scale].path, [scale], [None]), share)
            else:
                target.copy_(tensor)
            if not _is_finite(target):
                kind = "fp8" if isinstance(target, QuantizedWeight) else target.dtype
                raise ValueError(f"{path}: {name} has values that are NaN or infinite in {kind}")
    for name in stored.keys() - wanted.keys() - scales:
        (extra,) = _read(stored[name].path, [name], [None])
        try:
            check_harmless(name, extra, model)
        except ValueError as error:
            raise ValueError(f"{stored[name].path}: {error}") from None


def randomize(model: Transformer, seed: int) -> None:
    """Normal weights of standard deviation 0.02, norms 1: the published shape's speed without its weights. The model is
    the same for any number of ranks."""
    generator = torch.Generator(device=model.wte.device).manual_seed(seed)
    shapes = dict(tensor for group in published(model.config) for tensor in group.tensors())
    for name, part in model.checkpoint_tensors().items():
        if len(part.shape) == 1:
            part.fill_(1.0)
            continue
        share = _share(shapes[name], part.shape, model.ranks.rank)
        if share is None and not isinstance(part, QuantizedWeight):
            part.normal_(0.0, 0.02, generator=generator)
            continue
        whole = torch.empty(shapes[name], dtype=model.wte.dtype, device=model.wte.device)
        whole.normal_(0.0, 0.02, generator=generator)
        part.copy_(whole if share is None else whole[share])


def _is_finite(target: torch.Tensor | QuantizedWeight) -> bool:
    if isinstance(target, QuantizedWeight):
        return target.is_finite()
    # the minimum and maximum are NaN if any value is
    return bool(torch.stack(target.aminmax()).isfinite().all())


def _scales(
    config: ModelConfig, groups: list[TensorGroup], stored: dict[str, StoredTensor]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The names of the scale tensors, each with the shapes it may have: for all matrices of the layers, and for a head
    that has one."""
    if config.quantization is None:
        return {}
    of, head = config.quantization, model_class(config.architecture, "").HEAD
    found = {}
    for group in groups:
        for name, shape in group.tensors():
            if len(shape) == 2 and (group.indices or name == head and of.scale_name(name) in stored):
                found[of.scale_name(name)] = of.scale_shapes(shape)
    return found


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    index = folder / _INDEX
    if is_file(index):
        weight_map = _weight_map(index)
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    elif is_file(folder / _SINGLE):
        weight_map, paths = {}, [folder / _SINGLE]
    else:
        raise ValueError(f"{folder}: there is neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints are read")
    stored: dict[str, StoredTensor] = {}
    for path in paths:
        if not is_file(path):
            raise ValueError(f"{path}: this shard is named in {_INDEX}, but there is no such file")
        with _open(path) as shard:
            for name in shard.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                if name in stored:
                    raise ValueError(f"{path}: tensor {shown(name)} is in {stored[name].path.name} too")
                entry = shard.get_slice(name)
                stored[name] = StoredTensor(path, tuple(entry.get_shape()), entry.get_dtype())
    for name, file in weight_map.items():
        if name not in stored:
            raise ValueError(f"{folder / file}: {_INDEX} promises tensor {shown(name)} here, but it is not in the file")
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file in the index's own folder. The file may be a link, as in the Hub's cache."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: not a safetensors index with a weight_map of names and files")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise ValueError(f"{index}: {shown(name)} is in {shown(file)}, which is no plain file name")
    return weight_map


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    """Turns whatever safetensors raises inside the block into a ValueError that names the file."""
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file (truncated or damaged?): {reason(error)}") from error


def _share(whole: tuple[int, ...], part: tuple[int, ...], rank: int) -> tuple[slice, ...] | None:
    """The slices of a tensor of shape `whole` that are the rank's part, equal in size on all ranks; None for all of
    it."""
    if tuple(whole) == tuple(part):
        return None
    return tuple(slice(None) if n == k else slice(rank * k, (rank + 1) * k) for n, k in zip(whole, part, strict=True))


def _read(path: Path, names: list[str], shares: list[tuple[slice, ...] | None]) -> Iterator[torch.Tensor]:
    """Reads only the share of each tensor."""
    with _open(path) as shard:
        for name, share in zip(names, shares, strict=True):
            yield shard.get_tensor(name) if share is None else shard.get_slice(name)[share]


def _named(what: str, names: set[str]) -> list[str]:
    listed = ", ".join(name if len(name) < 100 and name.isprintable() else shown(name) for name in sorted(names)[:4])
    return [f"{len(names)} {what}: {listed}{', ...' if len(names) > 4 else ''}"] if names else []
