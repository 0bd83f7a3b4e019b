from collections.abc import Sequence

FEW_TOKENS: int
SPARSE_GEMM_TOKENS: int
MAX_ROW_FEATURES: int
MAX_NORM_FEATURES: int

_Facts = tuple[int, int, int, int, bool]

def build_info() -> dict[str, object]: ...
def support_table() -> list[dict[str, str]]: ...
def pack_metadata(neutral: bytes, tokens: int, in_features: int, layout: str) -> bytes: ...
def unpack_metadata(physical: bytes, tokens: int, in_features: int, layout: str) -> bytes: ...
def choose_packed(
    tokens: int,
    value_dtype: str,
    y_dtype: str,
    weight: _Facts,
    shifted: bool,
    scaled: bool,
    residual: bool,
    gated: bool,
    compute_capability_major: int,
    multiprocessors: int,
) -> tuple[str, str, str]: ...
def choose_path(
    on_cuda: bool,
    tokens: int,
    dtype: str,
    n: int,
    m: int,
    extra_columns: Sequence[int],
    weight: _Facts,
    lifted: _Facts | None,
    compute_capability_major: int,
    multiprocessors: int,
    weight_dtype: str,
    activation_dtype: str,
    variance_correction: bool,
    op: str = "sparse_linear",
) -> tuple[str, str, str]: ...
def head_norms_support(head_dim: int) -> bool: ...
def decode_attention_supports(q_heads: int, k_heads: int, head_dim: int) -> bool: ...
def gather_configs(
    tokens: int,
    out_features: int,
    in_features: int,
    bits8: bool,
    keep: int,
    group: int,
    compute_capability_major: int,
    multiprocessors: int,
    in_layer: bool = False,
) -> list[tuple[int, int, int, int]]: ...
def gemm_tiles(dtype: str) -> list[dict[str, int | str | bool]]: ...
def configure_gemm(
    tile: int, tokens: int, out_features: int, in_features: int, multiprocessors: int
) -> tuple[int, int, int, int, bool, bool]: ...
def select_gemm_config(
    dtype: str,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    weight_in_out: bool = False,
) -> tuple[int, int, int, int, bool, bool]: ...
def select_gemm_plan(
    dtype: str,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    residual: bool = False,
    weight_in_out: bool = False,
) -> tuple[int, ...]: ...
