"""What a request may ask of this engine; each check raises ValueError that says what to do."""

from typing import NamedTuple

from blockinfer.config import EngineConfig, ModelConfig
from blockinfer.sampling_params import SamplingParams


class Limits(NamedTuple):
    """num_pages: of the KV cache. num_eos: how many tokens logits_eos_inf forbids. num_last: how many
    confidence_eos_eot_inf ranks last."""

    model: ModelConfig
    config: EngineConfig
    num_pages: int
    num_eos: int
    num_last: int
    has_tokenizer: bool

    def check_fits(
        self, given: int, max_tokens: int, guided: bool, block_length: int = 1, whose: str = "the prompt's"
    ) -> None:
        """given: the number of given tokens; whose: what they belong to, for the error. guided: whether a shadow runs
        too. block_length: the canvas is rounded up to whole blocks."""
        if guided and self.config.max_num_seqs < 2:
            raise ValueError("cfg_scale needs max_num_seqs of at least 2, got 1: its shadow runs beside a request")
        lanes = 2 if guided else 1
        total = -(-(given + max_tokens) // block_length) * block_length
        asked = f"{whose} {given} tokens" + (f" and max_tokens={max_tokens} make {total}," if max_tokens else " are")
        if total > given + max_tokens:
            asked = asked.replace(" make", f" in whole blocks of {block_length} make")
        advice = "shorten the prompt" + " or lower max_tokens" * (max_tokens > 0)
        if total > self.config.max_model_len:
            raise ValueError(f"{asked} more than max_model_len={self.config.max_model_len}; {advice}")
        pages = lanes * -(-total // self.config.page_size)
        if pages > self.num_pages:
            asked = asked.replace(f" make {total},", "").removesuffix(" are")
            raise ValueError(
                f"{asked} need {pages} pages of {self.config.page_size} tokens, the KV cache has "
                f"{self.num_pages}; raise kv_cache_memory"
            )
        if lanes * total > self.config.max_num_batched_tokens:
            raise ValueError(
                f"with cfg_scale {total} tokens have {lanes * total} rows, more than "
                f"max_num_batched_tokens={self.config.max_num_batched_tokens}; {advice}"
            )

    def check_options(self, params: SamplingParams) -> None:
        """Refuses options that this checkpoint does not support."""
        self._check_candidates(params)
        if params.stop and not self.has_tokenizer:
            raise ValueError("stop strings need a tokenizer, and there is none; pass tokenizer= to LLM")
        size = self.model.vocab_size
        if params.logprobs is not None and params.logprobs > size:
            raise ValueError(f"logprobs={params.logprobs} is more than vocab_size={size}")
        for option, number in (("logits_eos_inf", self.num_eos), ("confidence_eos_eot_inf", self.num_last)):
            if getattr(params, option) and not number:
                raise ValueError(f"{option} acts on the EOS token, and this checkpoint names none; leave it False")
        outside = [i for i in params.stop_token_ids or () if i >= self.model.embedding_size]
        if outside:
            raise ValueError(f"stop_token_ids {outside} are outside the {self.model.embedding_size} embeddings")

    def _check_candidates(self, params: SamplingParams) -> None:
        """Every position must have a token that it can become."""
        config, mask_id = self.model, self.config.mask_token_id
        forbidden = {mask_id, *config.eos_token_ids} if params.logits_eos_inf else {mask_id}
        if len([i for i in forbidden if i < config.vocab_size]) == config.vocab_size:
            tokens = "the mask token and, by logits_eos_inf, EOS" if params.logits_eos_inf else "the mask token"
            raise ValueError(f"vocab_size={config.vocab_size} leaves no token to predict besides {tokens}")
