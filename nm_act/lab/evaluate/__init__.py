"""Quality and speed of sparse variants of a model, measured on the user's own text."""

from ..texts import read_text, tokenize
from .decode_speed import DecodeSpeed, decode_speed
from .perplexity import Perplexity, perplexity
from .variants import calibrated_copy, sparse_copy

__all__ = [
    "DecodeSpeed",
    "Perplexity",
    "calibrated_copy",
    "decode_speed",
    "perplexity",
    "read_text",
    "sparse_copy",
    "tokenize",
]
