"""Benchmarks of peft_hificl; each is run as `python -m benchmarks.<name>`."""
