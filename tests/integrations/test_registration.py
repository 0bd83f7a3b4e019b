"""Transformers knows nm_act's checkpoints and torch its operators once nm_act is imported, in every order; no other
program is touched."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import ROOT, environment


def test_torch_loads_nothing_of_ours():
    """The one entry point that runs in programs that do not name nm_act is vLLM's plug-in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert list(project["entry-points"]) == ["vllm.general_plugins"]


ORDERS = {
    "nm_act, then torch": "import nm_act, torch",
    "torch, then nm_act": "import torch, nm_act",
    "nm_act, then transformers": "import nm_act, transformers",
    "quantizers first of all": "import transformers.quantizers.auto, nm_act",
    "looked up in between": "import nm_act, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')",
    "imported in vain": """
import nm_act, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.quantizers.base":
            raise ImportError("once")
sys.meta_path.insert(0, Broken())
try:
    import transformers.quantizers.auto
except ImportError:
    sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, Broken)]
""",
}


CHECKS = """
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
assert 'nm_act' in AUTO_QUANTIZER_MAPPING and 'nm_act' in AUTO_QUANTIZATION_CONFIG_MAPPING
import sys, torch
assert torch.ops.nm_act.sparse_linear(torch.ones(1, 4), torch.ones(2, 4)).tolist() == [[2.0, 2.0]]
assert not [each for each in sys.meta_path if type(each).__module__.startswith('nm_act')]
"""


def _run(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=300, cwd=tmp_path)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_imports(order, tmp_path):
    done = _run(ORDERS[order] + CHECKS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "will load dense" not in done.stderr


STALE = {  # how an extension that was compiled before an operator was written looks from Python
    "no operator at all": """
import sys
from importlib import machinery, util
sys.modules["nm_act._C"] = util.module_from_spec(machinery.ModuleSpec("nm_act._C", None))
""",
    "an operator less": """
import torch._ops
found = torch._ops._OpNamespace.__getattr__
def without(namespace, name):
    if (namespace.name, name) == ("nm_act", "sparse_gemm"):
        raise AttributeError(f"'_OpNamespace' 'nm_act' object has no attribute {name!r}")
    return found(namespace, name)
torch._ops._OpNamespace.__getattr__ = without
""",
}


def test_what_was_not_built_is_named_by_every_name(tmp_path):
    program = """
import sys
sys.modules["nm_act._C"] = None
import nm_act
for name in nm_act.__all__:
    try:
        getattr(nm_act, name)
    except ImportError as error:
        print(name, error)
"""
    done = _run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert {"prune", "sparsify", "optimize", "NMLinear", "explain"} <= told.keys()
    for name, sentence in told.items():
        assert sentence.startswith("expected the compiled part of nm_act for this Python and torch, got: "), name
        assert sentence.endswith("; build it with: pip install -e ."), name


@pytest.mark.parametrize("case", STALE)
def test_an_extension_of_an_earlier_version_is_named(case, tmp_path):
    """``import nm_act, torch`` works; whatever needs an operator says in one sentence what to build."""
    done = _run(STALE[case] + "\nimport torch, nm_act\nnm_act.prune", tmp_path)
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith(
        "ImportError: expected the compiled part of this version of nm_act, got an older one without "
    )
    assert last.endswith("; build it again with: pip install --no-build-isolation -e .")
