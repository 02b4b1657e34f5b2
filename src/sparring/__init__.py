"""Self-play alignment under DeepSpeed: generate with vLLM, judge, train, iterate."""

__version__ = "0.1.0"
