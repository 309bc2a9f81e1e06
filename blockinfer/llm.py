"""LLM: a checkpoint, loaded and ready to generate."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from blockinfer.checks import check_text, nearest, refuse_unknown
from blockinfer.config import EngineConfig, ModelConfig
from blockinfer.engine.engine import Engine, Prompt
from blockinfer.engine.model_runner import EngineStats
from blockinfer.kernels.backend import num_compiled_kernels
from blockinfer.models.registry import SHAPES, model_class
from blockinfer.outputs import RequestOutput
from blockinfer.sampling_params import SamplingParams
from blockinfer.weights import load_weights, randomize

_MESSAGE = "{'role': ..., 'content': ...}"


class LLM:
    """A LLaDA checkpoint behind a batching engine.

    model: a local folder or a Hub name, which is fetched with its progress bars; a checkpoint's own code never runs.
    dtype: "auto" is the checkpoint's on a GPU and float32 on a CPU; or "float32", "bfloat16", "float16", "float64".
        Or a torch.dtype.
    device: "auto" (the GPU where there is one), "cpu" or "cuda".
    load_format: "auto", or "dummy": random weights of the config's shape, without weight files or a tokenizer. `model`
        may then also be "llada-8b", the published shape.
    tokenizer: another folder or Hub name for it. Without one prompts are token ids, and outputs have no text.
    revision: the Hub revision of the model; a local folder has none.
    mask_token_id: overrides the config's and the tokenizer's.
    max_model_len: prompt and max_tokens together, at most the config's max_sequence_length, which is the default.
    max_num_seqs: requests that run at once. max_num_batched_tokens: rows of one forward; default 8192 or max_model_len.
    page_size: tokens in a page of the KV cache. The cache holds max_num_seqs requests of max_model_len, but takes no
        more than kv_cache_memory bytes; by default 90 % of the GPU memory that a step leaves free, or half of a CPU
        machine's.
    enforce_eager: launches kernels one by one instead of as CUDA graphs: slower steps, and a faster load.
    cudagraph_capture_sizes: rows of a step, and masked rows, that a graph is captured for while loading; by default
        some 40 up to 2,048. A step is padded up to the next size. Both options mean nothing on a CPU.
    seed: of the seeds drawn for requests that bring none, and of dummy weights (there, None is 0).

    Raises ValueError for an option out of range and for a checkpoint that is broken or not implemented, TypeError for
    an unknown option.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        load_format: str = "auto",
        tokenizer: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        mask_token_id: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int | None = None,
        page_size: int = 16,
        kv_cache_memory: int | None = None,
        enforce_eager: bool = False,
        cudagraph_capture_sizes: Sequence[int] | None = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown("LLM", unknown, EngineConfig.__dataclass_fields__)
        config = EngineConfig(
            model=model,
            dtype=dtype,
            device=device,
            load_format=load_format,
            tokenizer=tokenizer,
            revision=revision,
            mask_token_id=mask_token_id,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            page_size=page_size,
            kv_cache_memory=kv_cache_memory,
            enforce_eager=enforce_eager,
            cudagraph_capture_sizes=cudagraph_capture_sizes,
            seed=seed,
        )
        folder, raw, source = _read_config(config)
        self.model_config = ModelConfig.from_dict(raw, source)
        make_model = model_class(self.model_config.architecture, source)
        self.tokenizer = _load_tokenizer(config, folder)
        self._check_tokenizer()
        self.config = config.resolve(self.model_config, getattr(self.tokenizer, "mask_token_id", None))
        with torch.inference_mode():
            network = make_model(self.model_config, self.config.dtype, self.config.device, self.config.max_model_len)
            if load_format == "dummy":
                randomize(network, seed or 0)
            else:
                load_weights(network, folder)
        self._engine: Engine | None = Engine(network, self.config, self.tokenizer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_finish: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Completes every prompt; the outputs come in the order of the prompts.

        A prompt is a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": [...]}; of a dict with both
        the ids are used. params is one SamplingParams for all or one each: max_tokens and the like go in there.
        use_tqdm shows a progress bar. on_finish is called with each output as it is finished. Whatever is raised
        meanwhile, Ctrl-C included, leaves an empty engine that can go on.

        Raises ValueError for a bad prompt, naming its number; FloatingPointError where the model's logits are NaN or
        infinite, at the latest once that block is through; RuntimeError on a closed LLM, while requests added to
        `engine` by hand are unfinished, and where on_finish aborted one of these.
        """
        engine = self.engine
        if engine.has_unfinished():
            raise RuntimeError("the engine has unfinished requests; step() until they are done or abort() them first")
        prompts = _as_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if not isinstance(params, list | tuple):
            raise ValueError(f"params must be a SamplingParams or one for each prompt, got {type(params).__name__}")
        if len(params) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts but {len(params)} params; give one, or one each")
        ids: list[int] = []
        outputs: dict[int, RequestOutput] = {}
        try:
            # no comprehension: in Python 3.12.1 an interrupt of one was seen to pass by the `finally`
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
                ids.append(self._add(i, prompt, p))
            with tqdm(total=len(ids), disable=not use_tqdm, unit="request", dynamic_ncols=True) as progress:
                tokens = 0
                while engine.has_unfinished():
                    for output in engine.step():
                        outputs[output.request_id] = output
                        tokens += len(output.outputs[0].token_ids)
                        progress.set_postfix(tokens=tokens, refresh=False)
                        progress.update()
                        if on_finish is not None:
                            on_finish(output)
        finally:
            engine.abort_all()
        missing = [i for i, request_id in enumerate(ids) if request_id not in outputs]
        if missing:
            raise RuntimeError(
                f"prompts {missing} were aborted, so their outputs are missing; on_finish had the others"
            )
        return [outputs[request_id] for request_id in ids]

    def chat(
        self,
        messages: list[dict[str, str]] | list[list[dict[str, str]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """`generate` on one conversation, or on a list of them, through the checkpoint's chat template.

        A conversation is a list of {"role": ..., "content": ...}. The template brings the special tokens. params is as
        for `generate`, max_tokens and the like in SamplingParams; options are use_tqdm and on_finish. Raises what
        `generate` does, and ValueError where there is no tokenizer or no template.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            missing = "tokenizer" if self.tokenizer is None else "chat template"
            raise ValueError(f"chat needs a {missing}, and {self.config.model} has none; use generate")
        prompts = []
        for i, conversation in enumerate(_conversations(messages)):
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            check_text(f"conversation {i}", text)
            token_ids = self.tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return self.generate(prompts, params, **options)

    @property
    def stats(self) -> EngineStats:
        """The engine's counts so far, as a copy: take differences."""
        return dataclasses.replace(self.engine.runner.stats, compiled=num_compiled_kernels())

    @property
    def engine(self) -> Engine:
        """What runs the requests. Raises RuntimeError once the LLM is closed."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def close(self) -> None:
        """Drops the model and the KV cache. Closing twice is fine; generating afterwards raises RuntimeError."""
        self._engine = None
        if self.config.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _add(self, number: int, prompt: Prompt, params: SamplingParams | None) -> int:
        try:
            return self.engine.add_request(prompt, params)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error

    def _check_tokenizer(self) -> None:
        size = self.model_config.vocab_size
        if self.tokenizer is not None and len(self.tokenizer) > size:
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path} has {len(self.tokenizer)} tokens, "
                f"the model's vocab_size is only {size}: they do not belong together"
            )


def _conversations(messages: object) -> list[list[dict[str, str]]]:
    """One conversation, or several, as a list of conversations, checked."""
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages must be a list of {_MESSAGE}, got {type(messages).__name__}")
    if not messages:
        raise ValueError("chat needs at least one message, got an empty list")
    conversations = [messages] if isinstance(messages[0], dict) else messages
    for i, conversation in enumerate(conversations):
        if not isinstance(conversation, list | tuple):
            raise ValueError(f"conversation {i}: it must be a list of {_MESSAGE}, got {type(conversation).__name__}")
        if not conversation:
            raise ValueError(f"conversation {i}: it has no messages")
        for j, message in enumerate(conversation):
            if not isinstance(message, dict):
                raise ValueError(f"conversation {i}: message {j} must be {_MESSAGE}, got {type(message).__name__}")
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ValueError(
                    f"conversation {i}: message {j} must be {_MESSAGE} with strings, got the keys {list(message)}"
                )
    return conversations


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as a list of prompts."""
    if not isinstance(prompts, str | dict | list | tuple):
        raise ValueError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    if isinstance(prompts, str | dict) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _read_config(config: EngineConfig) -> tuple[Path | None, dict[str, Any], str]:
    """-> the checkpoint's folder (None for a shape known by name), its config.json, and a name for errors."""
    dummy = config.load_format == "dummy"
    if dummy and config.model in SHAPES:
        return None, SHAPES[config.model], str(config.model)
    if config.model in SHAPES and not Path(config.model).is_dir():
        raise ValueError(f"{config.model!r} is a shape's name, for random weights: pass load_format='dummy' with it")
    files = ["config.json"] if dummy else ["*.json", "*.safetensors", "*.jinja"]
    folder = _fetch("checkpoint", config.model, config.revision, files)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: there is no config.json; a checkpoint in the Hugging Face format is expected")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a JSON object is expected, got {type(raw).__name__}")
    return folder, raw, str(path)


def _fetch(what: str, name: str | os.PathLike[str], revision: str | None, files: list[str]) -> Path:
    """A local folder as it is; anything else is looked for on the Hub. what: "checkpoint" or "tokenizer"."""
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for a Hub name, and {str(name)!r} is a local folder")
        return path
    if path.is_absolute() or path.exists() or str(name).startswith("."):
        raise ValueError(f"the {what} {str(name)!r} is no folder; a {what}'s folder or a Hub name is expected")
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
    except Exception as error:  # the Hub's client lets its HTTP library's own errors through
        message = f"the {what} {str(name)!r} is no local folder and could not be fetched from the Hub: {error}"
        if what == "checkpoint":
            message += "; for random weights of a published shape pass load_format='dummy' with one of "
            message += f"{', '.join(SHAPES)}{nearest(str(name), SHAPES)}"
        raise ValueError(message) from error


def _load_tokenizer(config: EngineConfig, folder: Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer asked for, or the checkpoint's; None where there is none, as for dummy weights."""
    if config.tokenizer is not None:
        folder = _fetch("tokenizer", config.tokenizer, None, ["*.json", "*.jinja"])
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder}: there is no tokenizer.json; the fast tokenizer's file is expected")
    elif config.load_format == "dummy" or not (folder / "tokenizer.json").is_file():
        return None
    try:
        # LLaDA's class, named outright: AutoTokenizer would look the model type up, which transformers does not know
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
