"""The model `blockinfer` of lm-eval 0.4.13: generate_until, loglikelihood and loglikelihood_rolling on the engine.

A task's requests all go to the engine at once, which keeps `--batch_size` of them running; finished ones are stored at
once if `--use_cache` names a file.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from blockinfer import LLM, SamplingParams
from blockinfer.chat import ChatTemplate
from blockinfer.engine.block_causal import most_tokens
from evals.lm_eval.options import BadArguments, answer_params, read_model_arguments

# a child of lm-eval's own logger, which it shows
logger = logging.getLogger("lm_eval.blockinfer")

# The number of continuations scored at a time: their values are cached after each.
_SCORED_AT_ONCE = 512


@register_model("blockinfer")
class BlockInferLM(TemplateLM):
    """`--model_args`: pretrained, a folder or a name on the Hub; the options of LLM; those of SamplingParams, for
    answers of tasks that set no others (`threshold`, `factor`, `entropy_bound` and `entropy_threshold` each select
    their rule); of ScoringParams mc_num, scoring_mode and is_greedy (False: the second value of a likelihood is then
    always False); seed (0), for all that is drawn; max_gen_toks (256). `--batch_size`: requests at once, `auto` 32.

    LLaDA's likelihood is an estimate: `mc_num` forwards of a continuation, one if it is one token. A continuation that
    does not fit loses the beginning of its context, and so does a prompt.
    """

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise BadArguments(
                "--max_batch_size is for models that look for the largest batch; here --batch_size says how many "
                "requests run at once: leave it out"
            )
        self._arguments = read_model_arguments({"pretrained": pretrained, **options}, batch_size, device)
        try:
            self.llm = LLM(**self._arguments.llm)
        except (TypeError, ValueError) as error:
            raise BadArguments(f"--model_args: {error}") from error
        self.tokenizer = self.llm.tokenizer
        if self.tokenizer is None:
            raise BadArguments(f"{self.llm.config.model} has no tokenizer; pass tokenizer= in --model_args")
        self._template = ChatTemplate(self.tokenizer)
        self._special_tokens = {str(t): i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        self._cut = 0
        if self.llm.config.max_num_seqs == 1:
            logger.warning("blockinfer: one request at a time; --batch_size auto is many times as fast")

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "BlockInferLM":
        """--model_args take precedence over lm-eval's own options, whose device defaults to cuda:0."""
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if str(more.get("device")).startswith("cuda") and not torch.cuda.is_available():
            del more["device"]
        return cls(**more | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "BlockInferLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.llm.config.max_model_len

    @property
    def eot_token_id(self) -> int:
        ids = self.llm.model_config.eos_token_ids
        return next(iter(ids)) if ids else self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """By default with the special tokens that begin a prompt, if the string has none."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Without add_generation_prompt the last message is the beginning of the answer."""
        if add_generation_prompt:
            return self._template.render(chat_history)
        *before, begun = chat_history
        return self._template.render(before) + begun["content"]

    # --- answers ---

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each answer up to the first of its task's `until`."""
        engine, texts, running = self.llm.engine, [""] * len(requests), {}
        before, start, self._cut = self.llm.stats, time.perf_counter(), 0
        tokens = nfe = 0
        try:
            for i, request in enumerate(requests):
                context, kwargs = request.args
                params = self._params(kwargs)
                running[engine.add_request(self._fitting(context, params), params)] = i
            with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as progress:
                while engine.has_unfinished():
                    for output in engine.step():
                        i = running.pop(output.request_id)
                        texts[i] = output.outputs[0].text
                        tokens += len(output.outputs[0].token_ids)
                        nfe += output.metrics.nfe
                        self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                        progress.update()
        except ValueError as error:
            raise BadArguments(str(error)) from error
        finally:
            engine.abort_all()
        seconds = time.perf_counter() - start
        launches = self.llm.stats.forwards - before.forwards
        logger.info(
            f"blockinfer: {len(requests)} answers, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} "
            f"tokens/s, {tokens / max(1, nfe):.2f} tokens a forward, {launches} launches"
        )
        self._tell_cut()
        return texts

    def _params(self, kwargs: dict[str, Any]) -> SamplingParams:
        normal = normalize_gen_kwargs(kwargs, default_max_gen_toks=self._arguments.max_gen_toks)
        # lm-eval's default for a temperature that no task names is not the user's choice
        if "temperature" not in kwargs and kwargs.get("do_sample") is None:
            normal["temperature"] = self._arguments.sampling.get("temperature", 0.0)
        return answer_params(self._arguments, normal, self._special_tokens)

    def _fitting(self, context: str, params: SamplingParams) -> dict[str, Any]:
        most = most_tokens(self.llm.config, self.llm.model_config, params.block_length)
        room = most - params.max_tokens
        if room < 1:
            raise BadArguments(f"max_gen_toks={params.max_tokens} leaves no room for a prompt in {most} tokens")
        token_ids = self.tok_encode(context)
        self._cut += len(token_ids) > room
        return {"prompt": context, "prompt_token_ids": token_ids[-room:]}

    # --- likelihoods ---

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each text the sum of its windows' likelihoods, each window after the last token of the one before."""
        windows, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            token_ids = self.tok_encode(text, add_special_tokens=False)
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(token_ids, self.prefix_token_id, self.max_length - 1, context_len=1),
            ):
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        before, start, self._cut = self.llm.stats, time.perf_counter(), 0
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as progress:
            for part in _parts(requests, _SCORED_AT_ONCE):
                pairs = [self._fitting_pair(context, continuation) for _, context, continuation in part]
                try:
                    results += self._scores(pairs)
                except ValueError as error:
                    raise BadArguments(str(error)) from error
                for (key, _, _), result in zip(part, results[-len(part) :], strict=True):
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, result)
                progress.update(len(part))
        seconds, now = time.perf_counter() - start, self.llm.stats
        logger.info(
            f"blockinfer: {len(requests)} continuations in {seconds:.1f} s: {len(requests) / seconds:.1f} a second, "
            f"{now.forwards - before.forwards} launches, {(now.rows - before.rows) / seconds:.0f} rows/s"
        )
        self._tell_cut()
        return results

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One forward scores all continuations of one token after the same context."""
        params = self._arguments.scoring
        single: dict[tuple[int, ...], dict[int, float]] = {}
        for context, continuation in pairs:
            if len(continuation) == 1 and not params.is_greedy:
                single.setdefault(tuple(context), {})[continuation[0]] = 0.0
        single = {context: tokens for context, tokens in single.items() if len(tokens) > 1}
        candidates = [[[token] for token in tokens] for tokens in single.values()]
        plain = replace(params, is_greedy=False)
        chosen = self.llm.choose(list(map(list, single)), candidates, plain, use_tqdm=False)
        for tokens, choice in zip(single.values(), chosen, strict=True):
            tokens.update(zip(tokens, choice.logprobs, strict=True))
        read = [single.get(tuple(a), {}).get(b[0]) if len(b) == 1 else None for a, b in pairs]
        others = [pair for pair, logprob in zip(pairs, read, strict=True) if logprob is None]
        scores = iter(self.llm.score([a for a, _ in others], [b for _, b in others], params, use_tqdm=False))
        scored = [next(scores) if logprob is None else None for logprob in read]
        return [
            (logprob, False) if score is None else (score.logprob, bool(score.is_greedy))
            for logprob, score in zip(read, scored, strict=True)
        ]

    def _fitting_pair(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        room = self.max_length - len(continuation)
        if room < 1:
            raise BadArguments(f"a continuation of {len(continuation)} tokens does not fit {self.max_length}")
        self._cut += len(context) > room
        return context[-room:], continuation

    def _tell_cut(self) -> None:
        if self._cut:
            logger.warning(f"blockinfer: {self._cut} prompts lost their beginning to fit {self.max_length} tokens")


def _parts(items: list, size: int) -> Iterable[list]:
    return (items[i : i + size] for i in range(0, len(items), size))
