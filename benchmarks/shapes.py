"""(out_features, in_features) of the projections that the benchmarks use, by model."""

import math
import random

LLAMA_3_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LLAMA_3_70B = {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}

# Layers of other families, to reveal a choice that fits Llama's sizes only: query, key and value merged; output of the
# attention; gate and up merged; down.
FAMILY_SHAPES = {
    "qwen2.5_7b": {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "qwen3_4b": {"qkv": (6144, 2560), "o": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728)},
    "gemma2_9b": {"qkv": (8192, 3584), "o": (3584, 4096), "gate_up": (28672, 3584), "down": (3584, 14336)},
    "mistral_nemo_12b": {"qkv": (6144, 5120), "o": (5120, 4096), "gate_up": (28672, 5120), "down": (5120, 14336)},
    "phi3_mini": {"qkv": (9216, 3072), "o": (3072, 3072), "gate_up": (16384, 3072), "down": (3072, 8192)},
    "olmo2_13b": {"qkv": (15360, 5120), "o": (5120, 5120), "gate_up": (27648, 5120), "down": (5120, 13824)},
}


def _draw_token_counts(count: int, largest: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(sorted(round(math.exp(draw.uniform(0, math.log(largest)))) for _ in range(count)))


TOKEN_COUNTS = _draw_token_counts(12, 20000, seed=0)
"""Log-uniform from 1 to 20000."""

# The shapes that the gather kernel's configurations are fitted to: Llama-3's and sixteen others of Qwen2.5, Qwen3,
# Gemma 2, Mistral, Phi-3 and OLMo 2, among them small ones of grouped keys and values, and few powers of two.
DECODE_SHAPES = (
    *LLAMA_3_8B.values(),
    *LLAMA_3_70B.values(),
    *((1024, 4096), (1536, 8960), (2048, 5120), (2560, 4096), (2560, 9728), (3072, 3072), (3584, 3584), (3584, 14336)),
    *(
        (4608, 3584),
        (5120, 5120),
        (6144, 2560),
        (9216, 3072),
        (14336, 4096),
        (18944, 3584),
        (19456, 2560),
        (28672, 5120),
    ),
)
