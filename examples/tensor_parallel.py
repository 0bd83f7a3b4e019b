"""Sharded generation through Transformers, on any number of GPUs (or CPU processes).

torchrun --nproc-per-node 2 examples/tensor_parallel.py MODEL [SAVE_TO]

MODEL is a folder written by save_pretrained: a sparse one is loaded as it is, a dense one is made sparse (8:16).
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import nm_act


def main(model_path: str, save_to: str = "") -> None:
    """Load the model's shard of this rank, generate, and save the whole checkpoint."""
    config = json.loads((Path(model_path) / "config.json").read_text())
    recipe = {} if "quantization_config" in config else {"quantization_config": nm_act.NMActConfig(pattern="8:16")}
    model = AutoModelForCausalLM.from_pretrained(
        model_path, distributed_config=DistributedConfig(tp_plan="auto"), **recipe
    )
    prompt = torch.tensor([[5, 7, 11, 13]], device=model.device)
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks:", tokens[0].tolist())
    if save_to:
        model.save_pretrained(save_to)  # every rank calls it; rank 0 writes what a single process would
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        raise SystemExit(f"expected MODEL [SAVE_TO], got {len(sys.argv) - 1} arguments; name the folder of a model")
    if not (Path(sys.argv[1]) / "config.json").is_file():
        raise SystemExit(f"expected the folder of a model, got {sys.argv[1]} without config.json; save a model there")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise SystemExit("expected at least two processes, got one; start it with torchrun --nproc-per-node 2")
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit(
            "expected accelerate, got none; install it with: pip install -e '.[accelerate]' in a checkout of nm_act"
        )
    main(*sys.argv[1:])
