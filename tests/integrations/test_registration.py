"""Transformers knows nm_act's checkpoints once nm_act is imported, in every order; no other program is touched."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _environment(tmp_path: Path) -> dict:
    """Environment in which the package is found, and no model on the hub."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}


def test_torch_loads_nothing_of_ours():
    """The one entry point that runs in programs that do not name nm_act is vLLM's plug-in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert list(project["entry-points"]) == ["vllm.general_plugins"]


ORDERS = {
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


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_imports(order, tmp_path):
    code = ORDERS[order] + (
        "\nfrom transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "assert 'nm_act' in AUTO_QUANTIZER_MAPPING and 'nm_act' in AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "import sys; assert not [f for f in sys.meta_path if type(f).__name__ == '_AfterImport']"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "will load dense" not in done.stderr
