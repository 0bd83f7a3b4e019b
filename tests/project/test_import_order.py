"""Whatever a program imports first, it has the operators and Transformers knows the checkpoints."""

import itertools
import subprocess
import sys

import pytest

CHECK = (
    "import sys, {}\n"
    "assert torch.ops.nm_act.sparse_linear(torch.ones(1, 4), torch.ones(2, 4)).tolist() == [[2.0, 2.0]]\n"
    "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING\n"
    "assert 'nm_act' in AUTO_QUANTIZATION_CONFIG_MAPPING\n"
    "assert not [each for each in sys.meta_path if type(each).__module__.startswith('nm_act')]\n"
)


@pytest.mark.parametrize("order", [", ".join(names) for names in itertools.permutations(("nm_act", "torch"))])
def test_operators_and_checkpoints_in_any_order(order):
    run = subprocess.run([sys.executable, "-c", CHECK.format(order)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
