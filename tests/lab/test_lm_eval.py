"""A saved sparse model in lm-eval's own command line: a program that knows nothing of nm_act."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny_model

import nm_act

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINT = ("torch.backends", "nm_act", "nm_act_autoload:register_with_transformers")


def _environment(tmp_path: Path) -> dict:
    """Environment in which the package counts as installed, however the suite itself found it."""
    group, name, value = ENTRY_POINT
    metadata = tmp_path / "site" / "nm_act_autoload-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nm_act_autoload\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    paths = [str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}


def test_the_entry_point_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group, name, value = ENTRY_POINT
    assert project["entry-points"][group][name] == value


def test_a_saved_model_loads_sparse_without_importing_nm_act(tmp_path):
    model, _ = tiny_model.build()
    nm_act.sparsify(model, nm_act.Recipe("2:4"))
    model.save_pretrained(tmp_path / "sparse")
    code = (
        "import sys, torch; assert not [m for m in sys.modules if m.startswith('nm_act.')];"
        "from transformers import AutoModelForCausalLM as A;"
        f"print(type(A.from_pretrained({str(tmp_path / 'sparse')!r}).model.layers[0].mlp.up_proj).__name__)"
    )
    for setting, expected in (("1", "NMLinear"), ("0", "Linear")):
        environment = {**_environment(tmp_path / setting), "TORCH_DEVICE_BACKEND_AUTOLOAD": setting}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
        )
        assert done.stdout.strip() == expected, done.stderr


ORDERS = {
    "transformers, then torch": "import transformers, torch",
    "quantizers first of all": "import transformers.quantizers.auto",
    "looked up in between": "import torch, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')",
    "imported in vain": """
import torch, sys
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
        [sys.executable, "-W", "error::UserWarning:nm_act_autoload", "-c", code],
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "will load dense" not in done.stderr


def test_lm_eval_command_line(tmp_path):
    """The harness's scores for the saved model are those of the same model made sparse here."""
    pytest.importorskip("lm_eval")
    from nm_act.lab.evaluate import tasks

    rows = [{"goal": f"Count {i}", "sol1": f"say {i}", "sol2": "jump over the dog", "label": i % 2} for i in range(6)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, tokenizer = tiny_model.build()
    report = nm_act.sparsify(model, nm_act.Recipe("2:4"))
    model.save_pretrained(tmp_path / "sparse")
    tokenizer.save_pretrained(tmp_path / "sparse")
    task, _ = tasks.build_task("piqa", tmp_path)
    expected = tasks.run_task(task, tasks.harness_model(report.model.eval(), tokenizer, 2))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'piqa.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "Question: {{goal}}\\nAnswer:"\ndoc_to_target: label\ndoc_to_choice: "{{[sol1, sol2]}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "mine", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'sparse'}", "--include_path", str(tmp_path / "tasks")]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "2"]
    done = subprocess.run(
        command, env=_environment(tmp_path), capture_output=True, text=True, timeout=500, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Unknown quantization type" not in done.stderr
    [samples] = (tmp_path / "out").rglob("samples_mine*.jsonl")
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert tuple(row["acc"] for row in found) == expected.scores
