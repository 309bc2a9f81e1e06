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
from blockinfer.engine.prompts import Prompt
from blockinfer.engine.sequence import BLOCKS, DENOISE
from blockinfer.engine.stats import EngineStats
from blockinfer.hints import LLM_HINTS
from blockinfer.kernels.backend import num_compiled_kernels
from blockinfer.likelihood import choose, score
from blockinfer.loading import load, prepare
from blockinfer.outputs import ChoiceOutput, RequestOutput, ScoreOutput
from blockinfer.parallel.leader import Leader
from blockinfer.sampling_params import SamplingParams
from blockinfer.scoring_params import ScoringParams


class LLM:
    """A LLaDA checkpoint with an engine that batches requests.

    model: a local folder or a Hub name, which is downloaded; a checkpoint's own code never runs.
    dtype: "auto" (the checkpoint's on a GPU, float32 on a CPU), "float32", "bfloat16", "float16" or "float64"; or a
        torch.dtype.
    quantization: "fp8" keeps the layers' matrices in float8_e4m3fn, with one scale per output channel, and quantises
        their inputs row by row. This halves bfloat16's memory. It is faster on GPUs of compute capability 8.9 or more,
        and slower elsewhere, for the same tokens except for rounding. Embeddings and LM head stay in dtype. None is how
        the checkpoint is stored. With tensor_parallel_size each rank quantises its own part of a row and of a matrix
        that is split by columns, so tokens may differ by rounding from those of one rank.
    device: "auto" (the GPU if there is one), "cpu" or "cuda".
    load_format: "auto", or "dummy": random weights of the config's shape, without weight files or a tokenizer. `model`
        may then also name a published shape: "llada-8b", "illada-8b", "llada-moe-7b", "llada2-mini".
    tokenizer: another folder or Hub name for it. Without a tokenizer prompts are token ids, and outputs have no text.
    revision: the Hub revision of the model; a local folder and a shape have none.
    mask_token_id: overrides the config's and the tokenizer's, which must agree without it.
    max_model_len: limit of prompt and max_tokens together; at most the config's, which is the default.
    max_num_seqs: requests that run at once. max_num_batched_tokens: rows of one forward; by default 8192, or
        max_model_len if that is more.
    page_size: tokens in a page of the KV cache; multiples of 8 make prompts faster on Hopper GPUs. The cache has room
        for max_num_seqs requests of max_model_len, but takes at most kv_cache_memory bytes. The default is 90 % of the
        GPU memory that is free after the weights, less what a step needs; on a CPU, half of what is free in the machine
        and in its container, shared by the ranks.
    tensor_parallel_size: GPUs that share the model. Each has a process, which this one starts and ends; on a CPU there
        are only processes. The size must divide the model's heads, KV heads, MLP and embeddings. If torchrun, or RANK
        and WORLD_SIZE, started the ranks, every tensor_parallel_size consecutive ranks share a model: the first
        continues the script; the others serve it here until it ends, and then raise SystemExit.
    enforce_eager: launches kernels one by one instead of as CUDA graphs: slower steps, but a faster load.
    cudagraph_capture_sizes: numbers of rows, and of masked rows, for which a graph is captured while loading; none may
        exceed max_num_batched_tokens. By default about 40 up to 2,048. A step is padded to the next size. Neither
        option has an effect on a CPU.
    seed: seeds the random seeds of requests without one, and dummy weights (for which None is 0).

    Raises ValueError for an option out of range, for a checkpoint that is broken or not implemented, and for a model
    that needs more memory than is free, before any is allocated; ChildProcessError if another rank ends meanwhile;
    TypeError for an unknown option.
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

        A prompt is a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": [...]}; if a dict has both,
        the ids are used. In a dict a prompt may have masked spans, at most max_tokens positions in all. These are
        filled, and the text around them stays: {"prompt": "1 + {fill:2} = 5"}, or {"prompt_token_ids": [...], "infill":
        True}, where every mask token is a position to fill. This needs a mode that sees what follows a block: vanilla,
        prefix_cache or dual_cache.

        sampling_params: one SamplingParams for all prompts, or one each. use_tqdm: show a progress bar. on_finish: is
        called with each output as it is finished. After any exception, Ctrl-C included, the engine is empty and usable.

        Raises ValueError for a bad prompt, naming its number; TypeError for an unknown option; FloatingPointError if
        the model's logits are NaN or infinite, at the latest when that block is finished; RuntimeError if the LLM is
        closed, another rank has ended (tensor_parallel_size), requests added to `engine` by hand are unfinished, an
        AsyncLLM has the engine, or on_finish aborted one of these requests.
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
            # again: a second Ctrl-C may have interrupted the first clean-up
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
            # no comprehension: in Python 3.12.1 an interrupt in one was seen to skip the `finally`
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
        """Completes one prompt -> an output for each block as it is finished, with all text and tokens so far; the last
        one is that of `generate`.

        Text that a later block could change, half a character, is held back. denoise: also yield an output after every
        step that finishes no block; its `canvas` is the open blocks. When the iterator is closed or raises, the engine
        is empty.

        Raises TypeError for an unknown option, and, when the first output is requested, what `generate` raises.
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

        A conversation is a list of {"role": ..., "content": ...}. The template adds the special tokens. It runs in a
        separate process, limited to 5 s of CPU time per conversation and 512 MiB (`chat.ChatTemplate`). The options are
        those of `generate`. Raises what that does, and ValueError if there is no tokenizer or no template, or if the
        template fails, naming the conversation.
        """
        refuse_generating("LLM.chat", unknown, "messages")
        prompts = self.chat_prompts(messages)
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, on_finish=on_finish)

    def chat_prompts(self, messages: list[dict[str, str]] | list[list[dict[str, str]]]) -> list[Prompt]:
        """The prompts that `chat` makes from one conversation, or from a list of them; raises what `chat` raises."""
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
        """The log-likelihood of one continuation per prompt, by LLaDA's estimate (`decoding.likelihood`).

        A continuation is a string, encoded without special tokens, or a list of token ids; it follows its prompt.
        Prompts are those of `generate`, without masked spans. Each mask is a request of one step, batched with the
        others. Raises what `generate` raises for a bad prompt, and ValueError for an empty continuation.
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
        """The probabilities of given candidates: one list of them for all prompts, or one list per prompt.

        A candidate follows the prompt, or fills its one masked span, whose length it must have. All one-token
        candidates are read off one forward, exactly, from the softmax over the whole vocabulary. The log-probability of
        a longer one is its score. Raises what `score` raises.
        """
        refuse_scoring("LLM.choose", unknown, "choices")
        engine = self._idle_engine()
        prompts = as_list(prompts)
        params = scoring_params_of(scoring_params)
        return choose(engine, prompts, lists_of_choices(choices, len(prompts)), params, use_tqdm)

    @property
    def stats(self) -> EngineStats:
        """A copy of the engine's counts since it was loaded; to measure a call, take the difference of two copies."""
        return dataclasses.replace(self.engine.runner.stats, compiled=num_compiled_kernels())

    @property
    def engine(self) -> Engine:
        """What runs the requests. Raises RuntimeError once the LLM is closed."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def take_over(self) -> Engine:
        """The engine, for exclusive use until `give_back`: two users would get each other's outputs.

        Raises RuntimeError if it is taken, busy or closed.
        """
        engine = self._idle_engine()
        self._taken = True
        return engine

    def give_back(self) -> None:
        """Ends `take_over`; the engine must be idle."""
        self._taken = False

    def _idle_engine(self) -> Engine:
        if self._taken:
            raise RuntimeError("an AsyncLLM has taken this LLM over; ask that one, or close() it first")
        if self.engine.has_unfinished():
            raise RuntimeError("the engine has unfinished requests; step() until they are done, or abort_all()")
        return self.engine

    def close(self) -> None:
        """Frees the model and the KV cache, and ends the processes of the chat template and of the other ranks.

        Closing twice is allowed; generating afterwards raises RuntimeError.
        """
        if self._engine is not None and self._leader is not None:
            # the other ranks may be in steps of requests that still run
            with suppress(RuntimeError):
                self._engine.abort_all()
        self._engine = None
        if self._chat_template is not None:
            self._chat_template.close()
        # if ranks have failed, a GPU may never be done: the leader drops what waits for it
        if not (self._leader and self._leader.failed):
            # the runner and its graphs' functions reference each other
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
