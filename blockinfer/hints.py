"""Other programs' option names: unknown option -> a hint that names ours.

From the generate functions of LLaDA and LLaDA2, Fast-dLLM, dInfer, Dream, transformers and vLLM.
"""


def _is(name: str, *foreign: str) -> dict[str, str]:
    return dict.fromkeys(foreign, f"it is called {name} here")


NO_PENALTY = "tokens are neither penalised nor favoured here"
ONLY_EOS_FORBIDDEN = "no token but EOS can be forbidden here (logits_eos_inf)"
_TEMPERATURE = "there is no such filter here: temperature alone shapes the sampling"
_CACHE = "mode says what is cached: vanilla, prefix_cache, dual_cache, block or block_refresh"

SAMPLING_HINTS = {
    **_is("max_tokens", "gen_length", "gen_len", "max_new_tokens", "max_gen_toks", "max_completion_tokens"),
    "max_length": "max_tokens counts generated positions, without the prompt",
    **_is("block_length", "block_size", "block_len"),
    **dict.fromkeys(
        ("steps", "diffusion_steps", "num_steps", "max_steps"),
        "denoising_steps are those of one block, not of all blocks together",
    ),
    **_is("denoising_steps", "steps_per_block"),
    **dict.fromkeys(
        ("minimal_topk", "num_to_transfer"),
        "denoising_steps say how many positions a step reveals at least; None is one",
    ),
    **_is("unmasking", "remasking", "remask", "alg", "rule", "strategy"),
    **_is("threshold", "confidence_threshold"),
    **_is("editing_threshold", "edit_threshold"),
    **_is("max_post_steps", "max_post_edit_steps"),
    **_is("commit_delay", "cache_delay_iter"),
    "refresh_interval": "mode says when K and V are computed anew: block_refresh does so at each block",
    **_is("temperature", "temp"),
    "do_sample": "temperature=0 is greedy, above it samples",
    **dict.fromkeys(("top_p", "top_k", "min_p", "typical_p"), _TEMPERATURE),
    **dict.fromkeys(
        ("repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty", "logit_bias"), NO_PENALTY
    ),
    **dict.fromkeys(
        ("bad_words", "min_tokens", "allowed_token_ids", "logits_processors", "guided_decoding", "structured_outputs"),
        ONLY_EOS_FORBIDDEN,
    ),
    **_is("n", "num_return_sequences", "num_samples"),
    "best_of": "n answers are all given back; choose among them",
    **dict.fromkeys(("num_beams", "use_beam_search"), "there is no beam search here"),
    **_is("logprobs", "top_logprobs"),
    "prompt_logprobs": "a prompt's tokens have no probabilities of their own here",
    **_is("cfg_scale", "cfg"),
    "guidance_scale": "cfg_scale is LLaDA's: 0 is no guidance, and guidance_scale - 1 elsewhere",
    **dict.fromkeys(("use_cache", "dual_cache", "prefix_cache", "cache", "if_cache_position"), _CACHE),
    **_is("stop", "stop_strings", "stop_sequences", "until"),
    "truncate_prompt_tokens": "prompts are never cut",
    **_is("stop_token_ids", "eos_token_id", "eos_id", "stop_tokens"),
    **dict.fromkeys(
        ("early_stop", "early_termination", "eos_early_stop"), "a stop token always ends a request, but for ignore_eos"
    ),
    **_is("mask_token_id, an option of LLM,", "mask_id"),
    **dict.fromkeys(("skip_special_tokens", "detokenize"), "text is decoded without special tokens"),
}

SCORING_HINTS = {
    **_is("mc_num", "mc", "num_mc", "n_mc", "num_samples", "monte_carlo_num"),
    **_is("cfg_scale", "cfg"),
    **_is("is_greedy", "is_check_greedy", "check_greedy"),
    **dict.fromkeys(("batch_size", "mc_batch_size"), "max_num_seqs, an option of LLM, is what runs at once"),
    **dict.fromkeys(
        ("temperature", "max_tokens", "n", "stop"), "nothing is sampled; it is an option of SamplingParams"
    ),
}

LLM_HINTS = {
    **_is("model", "model_path", "model_name", "pretrained_model_name_or_path"),
    **_is("dtype", "torch_dtype"),
    **_is("device", "device_map"),
    **_is("tokenizer", "tokenizer_path"),
    **_is("mask_token_id", "mask_id"),
    **_is("max_model_len", "max_seq_len", "max_length", "max_seq_length", "max_position_embeddings"),
    **_is("max_num_seqs", "batch_size", "max_batch_size"),
    **_is("page_size", "block_size"),
    **dict.fromkeys(
        ("gpu_memory_utilization", "num_gpu_blocks_override", "kv_cache_memory_bytes", "swap_space", "cpu_offload_gb"),
        "kv_cache_memory, in bytes, bounds the KV cache; weights are never moved out",
    ),
    **_is("tensor_parallel_size", "tp_size", "tp", "num_gpus"),
    "pipeline_parallel_size": "tensor_parallel_size GPUs share every layer; layers are not dealt out",
    "data_parallel_size": "start one for each part of the requests, as evals/slurm does",
    **dict.fromkeys(("trust_remote_code", "code_revision"), "a checkpoint's own code never runs; leave it out"),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), "quantization='fp8' is what there is"),
    "kv_cache_dtype": "the KV cache is of the model's dtype",
    "attn_implementation": "attention is this package's own",
}

GENERATE_HINTS = {
    **_is("sampling_params", "params", "generation_config", "sampling_param"),
    "prompt_token_ids": 'prompts may be lists of ids, or {"prompt_token_ids": [...]}',
    **_is("use_tqdm", "progress", "verbose", "show_progress"),
    "lora_request": "there are no adapters here",
    "stream": "outputs come when they are finished, and on_finish gets each one; LLM.stream gives one prompt's blocks",
    **dict.fromkeys(("chat_template", "tools", "tokenizer"), "the checkpoint's template and tokenizer are used"),
    **dict.fromkeys(
        ("add_generation_prompt", "continue_final_message"), "a conversation is always continued by the assistant"
    ),
}
