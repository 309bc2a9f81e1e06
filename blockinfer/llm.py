"""LLM: a checkpoint, loaded and ready to generate."""

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from tqdm.auto import tqdm

from blockinfer.arguments import (
    OF_SAMPLING,
    Continuation,
    as_list,
    lists_of_choices,
    one_each,
    params_for_each,
    refuse_generating,
    refuse_scoring,
    scoring_params_of,
)
from blockinfer.chat import ChatTemplate, check_conversations
from blockinfer.checks import check_bool, refuse_unknown, shown
from blockinfer.config import EngineConfig
from blockinfer.engine.engine import Engine
from blockinfer.engine.model_runner import EngineStats
from blockinfer.engine.prompts import Prompt
from blockinfer.engine.sequence import BLOCKS, DENOISE
from blockinfer.hints import LLM_HINTS
from blockinfer.kernels.backend import num_compiled_kernels
from blockinfer.likelihood import choose, score
from blockinfer.loading import load, prepare
from blockinfer.outputs import ChoiceOutput, RequestOutput, ScoreOutput
from blockinfer.parallel.leader import Leader
from blockinfer.sampling_params import SamplingParams
from blockinfer.scoring_params import ScoringParams


class LLM:
    """A LLaDA checkpoint behind a batching engine.

    model: a local folder or a Hub name, which is fetched with its progress bars; a checkpoint's own code never runs.
    dtype: "auto" is the checkpoint's on a GPU and float32 on a CPU; or "float32", "bfloat16", "float16", "float64".
        Or a torch.dtype.
    quantization: "fp8" keeps the layers' matrices in float8_e4m3fn, with a scale for each output channel, and quantises
        what they are multiplied with row by row: half of bfloat16's memory, and faster on a GPU of compute capability
        8.9; elsewhere slower, for the same tokens but for rounding. Embeddings and LM head stay in dtype. By default
        what the checkpoint is stored in. Several ranks (tensor_parallel_size) quantise their parts of a row each by
        itself, as of a matrix that they have in columns, so their tokens are those of one rank but for rounding too.
    device: "auto" (the GPU where there is one), "cpu" or "cuda".
    load_format: "auto", or "dummy": random weights of the config's shape, without weight files or a tokenizer. `model`
        may then also be a published shape's name: "llada-8b", "illada-8b",
        "llada-moe-7b", "llada2-mini".
    tokenizer: another folder or Hub name for it. Without one prompts are token ids, and outputs have no text.
    revision: the Hub revision of the model; a local folder has none.
    mask_token_id: overrides the config's and the tokenizer's.
    max_model_len: prompt and max_tokens together, at most what the config allows, which is the default.
    max_num_seqs: requests that run at once. max_num_batched_tokens: rows of one forward; default 8192 or max_model_len.
    page_size: tokens in a page of the KV cache. The cache holds max_num_seqs requests of max_model_len, but takes no
        more than kv_cache_memory bytes; by default 90 % of the GPU memory that weights and a step leave free, or half
        of what weights leave free of a CPU machine's, and of its container's.
    tensor_parallel_size: GPUs that share the model, a process each, which this one starts and ends; on a CPU processes
        alone. It must divide the model's heads, key and value heads, MLP and embeddings. Where torchrun, or RANK and
        WORLD_SIZE, have the ranks there, every so many of them share a model: the first goes on with the script, the
        others serve it until it ends, and leave the script here with SystemExit.
    enforce_eager: launches kernels one by one instead of as CUDA graphs: slower steps, and a faster load.
    cudagraph_capture_sizes: rows of a step, and masked rows, that a graph is captured for while loading; by default
        some 40 up to 2,048. A step is padded up to the next size. Both options mean nothing on a CPU.
    seed: of the seeds drawn for requests that bring none, and of dummy weights (there, None is 0).

    Raises ValueError for an option out of range, for a checkpoint that is broken or not implemented, and for a model
    that needs more memory than is free, which is known before any is taken; ChildProcessError where another rank ends
    meanwhile; TypeError for an unknown option.
    """

    _taken = False  # whether an AsyncLLM has the engine

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
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
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        cudagraph_capture_sizes: Sequence[int] | None = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> None:
        start = time.perf_counter()
        hints = OF_SAMPLING | LLM_HINTS
        refuse_unknown("LLM", unknown, EngineConfig.__dataclass_fields__, hints)
        config = EngineConfig(
            model=model,
            dtype=dtype,
            quantization=quantization,
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
            tensor_parallel_size=tensor_parallel_size,
            enforce_eager=enforce_eager,
            cudagraph_capture_sizes=cudagraph_capture_sizes,
            seed=seed,
        )
        self._leader = None if tensor_parallel_size == 1 else Leader(config, self)
        self._engine: Engine | None = None
        if self._leader is not None:
            loaded, self._engine = self._leader.open()
        else:
            loaded = load(prepare(config))
            self._engine = Engine(loaded.network, loaded.config, loaded.tokenizer)
            self._engine.runner.capture()
        self.model_config, self.config, self.tokenizer = loaded.model_config, loaded.config, loaded.tokenizer
        self._chat_template = self.tokenizer and ChatTemplate(self.tokenizer)
        self.load_seconds = time.perf_counter() - start

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_finish: Callable[[RequestOutput], None] | None = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Completes every prompt; the outputs come in the order of the prompts.

        A prompt is a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": [...]}; of a dict with both
        the ids are used. In a dict a prompt may have masked spans, which are filled, at most max_tokens positions in
        all, while the text around them stays: {"prompt": "1 + {fill:2} = 5"}, or {"prompt_token_ids": [...], "infill":
        True}, where every mask token is one. Modes that see what follows a block can do so: vanilla, prefix_cache and
        dual_cache. sampling_params is one SamplingParams for all or one each: max_tokens and the like go in
        there. use_tqdm shows a progress bar. on_finish is called with each output as it is finished. Whatever is raised
        meanwhile, Ctrl-C included, leaves an empty engine that can go on.

        Raises ValueError for a bad prompt, naming its number; TypeError for an unknown option; FloatingPointError where
        the model's logits are NaN or infinite, at the latest once that block is through; RuntimeError on a closed LLM,
        once another rank has ended (tensor_parallel_size), while requests added to `engine` by hand are unfinished or
        an AsyncLLM has the engine, and where on_finish aborted one of these.
        """
        refuse_generating("LLM.generate", unknown, "prompts")
        engine = self._idle_engine()
        check_bool("use_tqdm", use_tqdm)
        if on_finish is not None and not callable(on_finish):
            raise ValueError(f"on_finish must be a function of one output, got {shown(on_finish)}")
        prompts = as_list(prompts)
        params = params_for_each(sampling_params, len(prompts))
        try:
            return self._complete(prompts, params, use_tqdm, on_finish)
        finally:
            # once more: a second Ctrl-C may have cut the first clean-up short
            engine.abort_all()

    def _complete(
        self,
        prompts: list[Prompt],
        params: Sequence[SamplingParams | None],
        use_tqdm: bool,
        on_finish: Callable[[RequestOutput], None] | None,
    ) -> list[RequestOutput]:
        engine = self.engine
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
                        tokens += sum(len(completion.token_ids) for completion in output.outputs)
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

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        denoise: bool = False,
        **unknown: Any,
    ) -> Iterator[RequestOutput]:
        """Completes one prompt -> an output for each block as it is finished, each with all text and tokens so far, the
        last one as `generate` gives it.

        Text that a later block could change is held back: half a character. denoise gives besides an output after every
        step that finishes none, whose `canvas` is the open blocks. An iterator that is closed, or breaks off, leaves an
        empty engine.

        Raises TypeError for an unknown option, and what else `generate` does once the first output is asked for.
        """
        refuse_unknown("LLM.stream", unknown, ("prompt", "sampling_params", "denoise"), OF_SAMPLING)
        return self._stream(prompt, sampling_params, denoise)

    def _stream(self, prompt: Prompt, params: SamplingParams | None, denoise: bool) -> Iterator[RequestOutput]:
        engine = self._idle_engine()
        check_bool("denoise", denoise)
        prompts = as_list(prompt)
        if len(prompts) != 1:
            raise ValueError(f"stream takes one prompt, got {len(prompts)}; generate takes several")
        try:
            engine.add_request(prompts[0], params, stream=DENOISE if denoise else BLOCKS)
            while engine.has_unfinished():
                yield from engine.step()
        finally:
            engine.abort_all()

    def chat(
        self,
        messages: list[dict[str, str]] | list[list[dict[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_finish: Callable[[RequestOutput], None] | None = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """`generate` on one conversation, or on a list of them, through the checkpoint's chat template.

        A conversation is a list of {"role": ..., "content": ...}. The template brings the special tokens; it runs in a
        process of its own, which ends it after 5 s of CPU time a conversation, or at 512 MiB (`chat.ChatTemplate`).
        The options are those of `generate`. Raises what that does, and ValueError where there is no tokenizer or no
        template, and, naming the conversation, where the template fails.
        """
        refuse_generating("LLM.chat", unknown, "messages")
        prompts = self.chat_prompts(messages)
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, on_finish=on_finish)

    def chat_prompts(self, messages: list[dict[str, str]] | list[list[dict[str, str]]]) -> list[Prompt]:
        """The prompts that `chat` makes of a conversation, or of a list of them; raises what it does for them."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            if self.tokenizer is None:
                raise ValueError("chat needs a tokenizer, and there is none; pass tokenizer= to LLM")
            raise ValueError(f"chat needs a chat template, and {self.tokenizer.name_or_path} has none; use generate")
        engine = self.engine
        prompts: list[Prompt] = []
        for i, conversation in enumerate(check_conversations(messages)):
            try:
                text = self._chat_template.render(conversation)
                token_ids = engine.tokenize(text, add_special_tokens=False)
            except ValueError as error:
                raise ValueError(f"conversation {i}: {error}") from error
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return prompts

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Continuation | Sequence[Continuation],
        scoring_params: ScoringParams | None = None,
        *,
        use_tqdm: bool = True,
        **unknown: Any,
    ) -> list[ScoreOutput]:
        """The log-likelihood of a continuation for each prompt, by LLaDA's estimate (`decoding.likelihood`).

        A continuation is a string, encoded without special tokens, or a list of token ids; it follows its prompt.
        Prompts are those of `generate`, without masked spans. Each mask is a request whose one step is batched with the
        others'. Raises what `generate` does for a bad prompt, and ValueError for a continuation that is empty.
        """
        refuse_scoring("LLM.score", unknown, "continuations")
        engine = self._idle_engine()
        prompts = as_list(prompts)
        params = scoring_params_of(scoring_params)
        return score(engine, prompts, one_each(continuations, len(prompts), "continuations"), params, use_tqdm)

    def choose(
        self,
        prompts: Prompt | Sequence[Prompt],
        choices: Sequence[Continuation] | Sequence[Sequence[Continuation]],
        scoring_params: ScoringParams | None = None,
        *,
        use_tqdm: bool = True,
        **unknown: Any,
    ) -> list[ChoiceOutput]:
        """The probabilities of given candidates, the same for all prompts or a list of them for each.

        A candidate stands behind the prompt, or in its one masked span, of which it has the length. All candidates of
        one token are read off one forward, exactly, of the softmax over the whole vocabulary; a longer one's
        log-probability is its score. Raises what `score` does.
        """
        refuse_scoring("LLM.choose", unknown, "choices")
        engine = self._idle_engine()
        prompts = as_list(prompts)
        params = scoring_params_of(scoring_params)
        return choose(engine, prompts, lists_of_choices(choices, len(prompts)), params, use_tqdm)

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

    def take_over(self) -> Engine:
        """The engine, for one that alone uses it until `give_back`: two at once would have each other's outputs.

        Raises RuntimeError where it is taken, busy or closed.
        """
        engine = self._idle_engine()
        self._taken = True
        return engine

    def give_back(self) -> None:
        """Of an engine that was taken over, and is idle."""
        self._taken = False

    def _idle_engine(self) -> Engine:
        if self._taken:
            raise RuntimeError("an AsyncLLM has taken this LLM over; ask that one, or close() it first")
        if self.engine.has_unfinished():
            raise RuntimeError("the engine has unfinished requests; step() until they are done, or abort_all()")
        return self.engine

    def close(self) -> None:
        """Drops the model, the KV cache, the chat template's process and those of the other ranks.

        Closing twice is fine; generating afterwards raises RuntimeError.
        """
        if self._engine is not None and self._leader is not None:
            # the other ranks may be in steps of what still runs
            with suppress(RuntimeError):
                self._engine.abort_all()
        self._engine = None
        if self._chat_template is not None:
            self._chat_template.close()
        # where ranks have failed, a GPU may never be done: what waits for it is the leader's to drop
        if not (self._leader and self._leader.failed):
            # the runner and its two functions hold each other
            gc.collect()
            if self.config.device.type == "cuda":
                torch.cuda.empty_cache()
        if self._leader is not None:
            self._leader.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _add(self, number: int, prompt: Prompt, params: SamplingParams | None) -> int:
        try:
            return self.engine.add_request(prompt, params)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
