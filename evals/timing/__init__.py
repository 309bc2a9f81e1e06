"""Steps, kernels and stages of a step: what takes how long."""
