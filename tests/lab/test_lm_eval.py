"""A saved sparse model in lm-eval's own command line, started by ``nm-act run``."""

import json
import subprocess
import sys

import pytest
import tiny_model
from commands import environment

import nm_act


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
    command = [
        sys.executable,
        *["-m", "nm_act", "run", "lm_eval", "run", "--model", "hf", "--tasks", "mine", "--device", "cpu"],
    ]
    command += ["--model_args", f"pretrained={tmp_path / 'sparse'}", "--include_path", str(tmp_path / "tasks")]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "2"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Unknown quantization type" not in done.stderr
    [samples] = (tmp_path / "out").rglob("samples_mine*.jsonl")
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert tuple(row["acc"] for row in found) == expected.scores
