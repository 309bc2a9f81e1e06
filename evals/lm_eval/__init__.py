"""EleutherAI's lm-evaluation-harness on this engine: `python -m evals lm-eval --model blockinfer ...`."""
