"""Tensor parallelism over NCCL: a sparse model on two GPUs against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_cases import GPU_MARKS
from tiny_families import decide, family

import nm_act

pytestmark = [*GPU_MARKS, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
RANKS = Path(__file__).resolve().parent.parent / "two_gpus.py"


@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_two_gpus_equal_one(tmp_path, pattern):
    """In float32 the first layer is equal up to rounding; later ones amplify that, so greedy tokens are compared."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 2048}
    model = decide(family("llama", **sizes)).to("cuda", torch.float32)
    nm_act.sparsify(model, nm_act.Recipe(pattern))
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(0)).cuda()
    first = []
    handle = model.model.layers[0].register_forward_hook(lambda _, args, y: first.append(y.clone()))
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
        handle.remove()
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    torch.save({"ids": ids.cpu(), "first": first[0].cpu(), "tokens": tokens.cpu()}, tmp_path / "one_gpu.pt")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(RANKS), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    print(run.stdout)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "two GPUs" in run.stdout
