"""(out_features, in_features) of the projections that the benchmarks use, by model."""

LLAMA_3_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LLAMA_3_70B = {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}

# What the decode kernel's configurations are fitted to: Llama-3's shapes and sixteen others of Qwen2.5 and Qwen3,
# Gemma 2, Mistral, Phi-3 and OLMo 2, small ones of grouped keys and values among them, few of them powers of two.
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
