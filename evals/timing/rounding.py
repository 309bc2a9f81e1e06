"""How far fp8 moves a shape's logits, by its number of layers: `python -m evals rounding --layers 1,2,4`.

Random weights, the same with and without fp8, otherwise in bfloat16. The error is the norm of the logits' difference
over that of the logits without fp8, on the masked rows of a canvas of random tokens. Random layers do not correct the
rounding of earlier ones, as trained ones may, so this is the worst case.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from blockinfer import LLM, SamplingParams
from blockinfer.config import DTYPES
from blockinfer.model_config import architecture
from blockinfer.models.registry import MODELS, SHAPES
from evals.files import number_argument

# The tokens whose logits are compared, and the number of tokens before them.
_MASKED, _PROMPT = 32, 96


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m evals rounding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quantized = [name for name, shape in SHAPES.items() if MODELS[architecture(shape, name)].QUANTIZES]
    parser.add_argument("--model", choices=quantized, default="llada-8b", help="a shape (llada-8b)")
    layers = "numbers of layers, a comma list (1,2,4,8,16,32); on a CPU 8 take some minutes and 9 GB"
    parser.add_argument("--layers", type=_layers, default=[1, 2, 4, 8, 16, 32], help=layers)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what is not quantised (bfloat16)")
    return parser


def _layers(text: str) -> list[int]:
    return [number_argument(1)(part) for part in text.split(",")]


def masked_logits(config: dict, dtype: str, quantization: str | None) -> torch.Tensor:
    """[masked rows, vocabulary's size] float32, of a network of this config with random weights."""
    options = dict(load_format="dummy", max_num_seqs=1, max_model_len=_PROMPT + _MASKED, enforce_eager=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        llm = LLM(folder, dtype=dtype, quantization=quantization, **options)
    model, vocab = llm.engine.model, llm.model_config.vocab_size
    logits_of, kept = model.logits, []

    def keep(*args: torch.Tensor) -> torch.Tensor:
        kept.append(logits_of(*args))
        return kept[-1]

    prompt = torch.randint(0, vocab, (_PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    one_step = SamplingParams(max_tokens=_MASKED, block_length=_MASKED, denoising_steps=1, ignore_eos=True)
    with llm:
        model.logits = keep
        llm.generate([prompt], one_step, use_tqdm=False)
        # otherwise the model would hold itself, and its memory would not be free for the next
        del model.logits
    return torch.cat(kept)[:_MASKED, :vocab].float()


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    print("| layers | relative error of the logits, % |", "|---|---|", sep="\n", flush=True)
    for layers in args.layers:
        shape = SHAPES[args.model]
        config = shape | {"n_layers" if "n_layers" in shape else "num_hidden_layers": layers}
        try:
            plain, quantized = (masked_logits(config, args.dtype, quantization) for quantization in (None, "fp8"))
        except ValueError as error:
            parser.error(str(error))
        print(f"| {layers} | {100 * float((quantized - plain).norm() / plain.norm()):.3g} |", flush=True)
