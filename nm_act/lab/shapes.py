"""Shapes of known models, by which speed-ups are predicted; in a module of its own, which imports no torch."""

SHAPES = {
    "llama-3-8b": (32, 4096, 14336, 4096, 1024),
    "llama-3-70b": (80, 8192, 28672, 8192, 1024),
    "llama-3.2-1b": (16, 2048, 8192, 2048, 512),
    "gemma-3-4b": (34, 2560, 10240, 2048, 1024),
    "qwen2.5-7b": (28, 3584, 18944, 3584, 512),
    "smollm2-135m": (30, 576, 1536, 576, 192),
}
"""Model -> decoder layers, hidden size, inner size of the MLP, features of all query and of all key heads."""
