"""The examples run as a user runs them, and agree with a single process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import tp_cases
from conftest import needs

from nm_act import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A sparse checkpoint, and the tokens that it generates."""
    folder = tp_cases.save(tmp_path_factory.mktemp("examples") / "model", Recipe("8:16", mitigation=["var"]))
    prompt = torch.tensor([[5, 7, 11, 13]])
    return folder, tp_cases.load(folder).generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()


def _run(*command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.slow
def test_tensor_parallel(model, tmp_path):
    folder, tokens = model
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run = _run(*launcher, EXAMPLES / "tensor_parallel.py", folder, tmp_path / "saved")
    assert f"2 ranks: {tokens}" in run.stdout, run.stderr[-3000:]
    assert tp_cases.load(tmp_path / "saved").nm_act_recipe == Recipe("8:16", mitigation=["var"])


def test_device_map(model):
    pytest.importorskip("accelerate")
    folder, tokens = model
    run = _run(EXAMPLES / "device_map.py", folder)
    assert str(tokens) in run.stdout, run.stderr[-3000:]


@pytest.mark.slow
@needs("vllm")
def test_vllm_generate(model):
    """The whole engine, compiled, in a process that knows nothing of nm_act but its entry point.

    In float32, as the Transformers model: in 16 bits rounding decides what survives, so two engines need not agree.
    """
    folder, tokens = model
    with torch.no_grad():
        best = tp_cases.load(folder)(torch.tensor([tokens[:-1]])).logits[0, 3:].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-2, "no token is a near tie, float32 rounding being about 1e-5"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    run = _run(EXAMPLES / "vllm_generate.py", folder, "float32", **environment)
    assert f"generated {tokens[4:]}" in run.stdout, run.stderr[-3000:]


@pytest.mark.parametrize("name", ["tensor_parallel", "device_map", "vllm_generate"])
def test_examples_say_what_they_want(name):
    run = _run(EXAMPLES / f"{name}.py")
    assert run.returncode != 0
    assert run.stderr.strip().startswith("expected MODEL"), run.stderr
    assert run.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("name", ["tensor_parallel", "device_map", "vllm_generate"])
def test_a_folder_that_does_not_exist(name, tmp_path):
    missing = tmp_path / "missing"
    run = _run(EXAMPLES / f"{name}.py", missing, WORLD_SIZE="2")
    told = f"expected the folder of a model, got {missing} without config.json; save a model there"
    assert (run.returncode, run.stderr.strip()) == (1, told)


@pytest.mark.parametrize("name", ["tensor_parallel", "device_map"])
def test_examples_name_the_extra_of_accelerate(name, tmp_path):
    hidden = "import runpy, sys; sys.modules['accelerate'] = None; sys.argv = sys.argv[1:]; "
    hidden += "runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "config.json").write_text("{}")
    run = _run("-c", hidden, EXAMPLES / f"{name}.py", tmp_path, WORLD_SIZE="2")
    assert (
        run.stderr.strip()
        == "expected accelerate, got none; install it with: pip install -e '.[accelerate]' in a checkout of nm_act"
    )
