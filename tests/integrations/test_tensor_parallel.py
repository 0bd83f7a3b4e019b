"""Tensor parallelism: two CPU processes against one, through Transformers' own plan."""

import contextlib
import copy
import dataclasses
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

transformers = pytest.importorskip("transformers")

import tp_cases  # noqa: E402
from conftest import assert_same_bits, hard_activations  # noqa: E402
from ranks import run_ranks  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_families import family  # noqa: E402

from nm_act import NMPattern, Recipe, Rule, parallel, reference, sparsify  # noqa: E402
from nm_act.integrations.tensor_parallel import check_plan  # noqa: E402

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

RECIPES = {
    "act": Recipe("2:4"),
    "wina-var": Recipe("8:16", criterion="wina", mitigation=["var"]),
    "variance-median": Recipe("4:8", criterion="variance", mitigation=["dpts-median"]),
    "amber-mean-var": Recipe("16:32", criterion="amber", mitigation=["dpts-mean", "var"], skip_layers=[1]),
    "windows-var": Recipe("2:4+1", mitigation=["var", "dpts-mean"]),
    "clact-var": Recipe("4:8", criterion="clact", mitigation=["var"]),
    "spts-ls-var": Recipe("8:16", criterion="wina", mitigation=["spts", "ls", "var"]),
    "low-rank-pcs-lpts": Recipe("2:4", criterion="amber", mitigation=["rsparse-4", "pcs", "lpts"]),
    "fit-ls-first": Recipe("4:8", criterion="wina", mitigation=["rsparse-4-fit", "ls"], dense_first_tokens=2),
    "permute-pcs": Recipe("4:8", mitigation=["permute", "pcs", "spts-scalar"]),
    "wanda": Recipe("4:8", criterion="wanda"),
    "column-only": Recipe(
        "2:4",
        mitigation=["larosa", "spts"],
        rules=[
            Rule(projections=["up_proj"], pattern="50%", mitigation=["dpts-mean", "ls"]),
            Rule(projections=["o_proj"], pattern="50%", criterion="weight-magnitude", mitigation=[]),
            Rule(projections=["down_proj"], mitigation=["ls"]),
        ],
    ),
    "first-prefill": Recipe("8:16", mitigation=["dpts-median"], phase="prefill", dense_first_tokens=1),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("tp")
    return {name: tp_cases.save(place / name, recipe) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize(("layout", "dtype"), [("in_out", torch.float32), ("out_in", torch.bfloat16)])
def test_layers_and_model_equal_a_single_process(folders, layout, dtype):
    run_ranks(tp_cases.every_layer_and_the_model, list(folders.values()), layout, dtype)


def test_fused_projections(tmp_path):
    """Phi-3: the outputs of qkv_proj and gate_up_proj are gathered, the inputs of o_proj and down_proj cut again."""
    dense = family("phi3", hidden_size=128, intermediate_size=192, vocab_size=128, eos_token_id=None)
    names = ("amber-mean-var", "spts-ls-var", "low-rank-pcs-lpts", "wanda")
    projections = ("qkv_proj", "gate_up_proj", "o_proj", "down_proj")
    recipes = {name: dataclasses.replace(RECIPES[name], projections=projections) for name in names}
    folders = [tp_cases.save(tmp_path / name, each, dense=copy.deepcopy(dense)) for name, each in recipes.items()]
    run_ranks(tp_cases.every_layer_and_the_model, folders, "in_out", torch.float32)


@pytest.mark.parametrize("name", ["wina-var", "low-rank-pcs-lpts"])
def test_saving_and_loading(name, folders, tmp_path):
    run_ranks(tp_cases.save_and_load, folders[name], tmp_path)
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, folders[name]))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    texts = [(folder / "config.json").read_text() for folder in (tmp_path, folders[name])]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("check", "name"),
    [
        (tp_cases.gradients_enabled, "variance-median"),
        (tp_cases.optimize_changes_nothing, "act"),
        (tp_cases.under_autocast, "spts-ls-var"),
        (tp_cases.pipeline, "low-rank-pcs-lpts"),
    ],
)
def test_a_checkpoint_over_ranks(check, name, folders):
    run_ranks(check, folders[name])


def test_sizes_that_cut_a_group_or_a_head(folders, tmp_path):
    """The whole sentence, on every rank, before a weight is read."""
    config = transformers.LlamaConfig(**tp_cases.SIZES | {"intermediate_size": 96})
    sparsify(model := transformers.LlamaForCausalLM(config), Recipe("16:32")).model.save_pretrained(tmp_path)
    run_ranks(
        tp_cases.one_sentence,
        tmp_path,
        "expected a tensor-parallel size among 1, got 2, which would cut the 96 in_features of "
        "model.layers.0.mlp.down_proj (in groups of 32); choose one of those sizes or another pattern",
    )
    for size, what in ((3, "the 128 out_features of model.layers.0.self_attn.q_proj"), (4, "the 2 attention heads of")):
        model.config.distributed_config = _config(size, "auto")
        sentence = f"expected a tensor-parallel size among 1, got {size}, .* cut {what}.*; choose one of those sizes$"
        with pytest.raises(ValueError, match=sentence):
            check_plan(model)
    model.config.distributed_config = _config(2, {"layers.*.mlp.down_proj": "colwise"})
    check_plan(model.model)  # the caller's plan replaces the model's, which would cut a group
    model.config.distributed_config = _config(4, {})
    check_plan(model)  # no rule at all


@pytest.mark.parametrize(
    ("style", "cuts"), [("colwise", True), ("colwise_gather_output", False), ("colwise_rep", False)]
)
def test_gathered_outputs_cut_no_head(style, cuts):
    model = sparsify(tp_cases.build(), Recipe("2:4")).model
    columns = [f"model.layers.*.self_attn.{name}_proj" for name in "qkv"]
    plan = dict.fromkeys(columns, style) | {"model.layers.*.self_attn.o_proj": "rowwise_split_input"}
    model.config.distributed_config = _config(4, plan)
    with pytest.raises(ValueError, match="cut the 2 attention heads") if cuts else contextlib.nullcontext():
        check_plan(model)


def test_fsdp_of_transformers_is_refused(folders):
    """It would be taken for column parallelism, whose parts are never put together again."""
    run_ranks(
        tp_cases.one_sentence,
        folders["act"],
        "expected a sparse model without FSDP, got a DistributedConfig with fsdp_size 2; use tensor parallelism alone "
        "(tp_size)",
        {"fsdp_size": 2},
    )
    model = sparsify(tp_cases.build(), Recipe("2:4")).model
    for field in ("dp_replicate_size", "dp_size"):
        model.config.distributed_config = SimpleNamespace(tp_size=1, tp_plan=None, fsdp_size=1, **{field: 2})
        with pytest.raises(ValueError, match=rf"without FSDP, got a DistributedConfig with {field} 2; use "):
            check_plan(model)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"mitigation": ["larosa"]}, r"a rotation \(larosa\), which mixes all in_features"),
        ({"pattern": "50%"}, "top-k, which compares all in_features"),
    ],
)
def test_methods_that_cannot_be_split_are_named_with_their_layer(fields, what):
    model = sparsify(tp_cases.build(), Recipe(**{"pattern": "2:4", **fields})).model
    model.config.distributed_config = _config(2, None)
    sentence = rf"expected model\.layers\.0\.self_attn\.o_proj, whose in.* are split.*, without {what}, got"
    with pytest.raises(ValueError, match=sentence):
        check_plan(model)


def _config(size, plan):
    """The parts of Transformers' DistributedConfig, of any of its versions, that are read."""
    return SimpleNamespace(tp_size=size, tp_plan=plan, enable_expert_parallel=False)


def test_plan_without_splitting():
    model = sparsify(tp_cases.build(), Recipe("2:4")).model
    check_plan(model)
    model.config.distributed_config = _config(None, None)
    check_plan(model)


def test_a_split_model_cannot_be_converted(tmp_path):
    tp_cases.build().save_pretrained(tmp_path)
    run_ranks(tp_cases.refuses_a_split_model, tmp_path)


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (tp_cases.fully_sharded, [Recipe("8:16", criterion="wina", mitigation=["var", "dpts-mean"])]),
        (tp_cases.torch_styles, [Recipe("8:16", criterion="wina")]),
        (tp_cases.split_twice, []),
    ],
)
def test_other_ways_to_split(check, arguments):
    run_ranks(check, *arguments)


# ---- the arithmetic of a row-parallel layer, without processes ----


def test_eight_bit_weights_are_not_split_by_rows():
    x, weight, scale = torch.randn(2, 32), torch.randn(8, 32).to(torch.float8_e4m3fn), torch.ones(8)
    shard = parallel.Shard("row", 0, 2, lambda each: each)
    with pytest.raises(ValueError, match="expected a weight in the dtype of x in a layer split by rows, got weight_sc"):
        parallel.row_sparse_linear(shard, x, weight, None, NMPattern(4, 8), weight_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"token_shift": "mean"},
        {"token_shift": "median", "variance_correction": True},
        {"variance_correction": True, "column_scale": torch.rand(24)},
        {"shift": torch.randn(64)},
        {"shift": torch.randn(64), "variance_correction": True},
        {"channel_scale": torch.rand(64), "variance_correction": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_row_parallel_terms_add_up(options, size, dtype):
    x, weight, bias = torch.randn(2, 5, 64).to(dtype) + 0.5, torch.randn(24, 64).to(dtype), torch.randn(24).to(dtype)
    expected = reference.sparse_linear(x, weight, bias, "4:8", **options)

    def term(shard):
        inputs = {key: shard.part(options[key], ("in",)) for key in ("shift", "channel_scale") if key in options}
        part, columns = (each.chunk(size, dim=-1)[shard.rank] for each in (x, weight))
        mine = bias if shard.rank == 0 else None
        return parallel.row_sparse_linear(shard, part, columns, mine, NMPattern(4, 8), **{**options, **inputs})

    y = sum(each.double() for each in _in_threads(size, term))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("size", [1, 2])
def test_row_parallel_float16_is_scaled_before_it_is_rounded(size):
    x, weight = torch.zeros(5, 64), torch.zeros(16, 64)
    x[:, ::2], x[:, 1::2] = 250.0, -249.0  # Var 249.5^2, of the kept even ones 125^2
    weight[:, ::2] = 10.0
    x, weight = x.half(), weight.half()

    def term(shard):
        part, columns = (each.chunk(size, dim=-1)[shard.rank] for each in (x, weight))
        options = {"variance_correction": True, "column_scale": torch.full((16,), 0.25)}
        return parallel.row_sparse_linear(shard, part, columns, None, NMPattern(8, 16), **options)

    y = sum(each.double() for each in _in_threads(size, term))
    torch.testing.assert_close(y, torch.full((5, 16), 39_920.0).double(), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("kind", ["mean", "median"])
def test_statistics_over_ranks_are_the_whole_tokens(kind):
    x = hard_activations(40, 64, torch.float32)
    z, pruned = x.nan_to_num(0, 1, -1), reference.prune(x.nan_to_num(0, 1, -1), "2:4")

    def statistics(shard):
        mine, *others = (each.chunk(4, dim=-1)[shard.rank] for each in (x, z, pruned))
        eta = parallel.row.token_shift_over_ranks(shard, mine, kind)
        return eta, parallel.row.variance_ratio_over_ranks(shard, *others)

    for eta, nu in _in_threads(4, statistics):
        assert_same_bits(eta, reference.token_shift_values(x, kind), any_nan=True)
        torch.testing.assert_close(nu, reference.variance_ratio(z, pruned).float(), rtol=1e-6, atol=0)


def _in_threads(size, function):
    """``function(shard)`` of every rank, each in a thread."""
    barrier, slots = threading.Barrier(size, timeout=30), [None] * size

    def gather(rank, tensor):
        slots[rank] = tensor
        barrier.wait()
        gathered = torch.stack(slots)
        barrier.wait()  # nobody overwrites a slot that another has not read
        return gathered

    shards = [parallel.Shard("row", rank, size, functools.partial(gather, rank)) for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(function, shards))


# ---- the harness itself: nothing hangs ----


def test_a_rank_that_dies_ends_the_test():
    start = time.monotonic()
    # Its end is what is reported, or what the other rank makes of it, whichever is noticed first.
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException), match=r"exit code 7|\[127\.0\.0\.1\]"):
        run_ranks(tp_cases.dies, 1)
    assert time.monotonic() - start < 60


def test_a_rank_that_hangs_ends_the_test():
    with pytest.raises(TimeoutError, match="hangs: not done after 5 s"):
        run_ranks(tp_cases.hangs, timeout=5)
