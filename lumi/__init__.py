"""Lumi: small language models from raw text to answers, on kernels that a person can read."""

__version__ = "0.1.0"
