"""One rank of tests/cuda/test_cuda_two_gpus.py, started by torchrun: the model of a folder, against one GPU's results."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import nm_act  # noqa: F401  registers the checkpoint's quantisation


def main(folder: str) -> None:
    """Compare the first layer's output and eight greedy tokens."""
    expected = torch.load(Path(folder) / "one_gpu.pt")
    distributed = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=distributed, dtype=torch.float32).eval()
    assert dist.get_backend() == "nccl" or "nccl" in str(dist.get_backend_config()), dist.get_backend()
    ids, first = expected["ids"].to(model.device), []
    handle = model.model.layers[0].register_forward_hook(lambda _, args, y: first.append(y.clone()))
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
        handle.remove()
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    y = expected["first"].to(model.device)
    error = ((first[0] - y).norm() / y.norm()).item()
    assert error < 1e-5, f"layer 1 is off by {error}"
    assert torch.equal(tokens.cpu(), expected["tokens"]), (tokens.tolist(), expected["tokens"].tolist())
    sharded = [n for n, m in model.named_modules() if type(m).__name__ == "NMLinear" and "down" in n]
    assert sharded
    if dist.get_rank() == 0:
        print(f"two GPUs: layer 1 off by {error:.1e}, 8 tokens equal")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
