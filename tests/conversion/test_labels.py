"""Documents without a valid label are refused by file and row; of several splits a labelled one is taken."""

import json
import math

import pytest

from nm_act.lab.evaluate import tasks

pytest.importorskip("lm_eval")

PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}
BOOLQ = {"passage": "p", "question": "q", "label": 0}
WINOGRANDE = {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "2"}
HELLASWAG = {"ctx_a": "a", "ctx_b": "b", "activity_label": "c", "endings": ["1", "2", "3", "4"], "label": "3"}
ARC = {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
QUERY = {"query": "q", "choices": ["x", "y"], "gold": 1}
PARTIAL = {"context_options": ["x", "y"], "continuation": "z", "gold": 0}
ENDINGS = {"query": "q", "choices": ["x", "y", "z"], "label": 2}


def _write(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("task", "row", "wrong", "allowed"),
    [
        ("piqa", PIQA, {"label": -1}, "0, 1"),
        ("piqa", PIQA, {"label": "1"}, "0, 1"),
        ("piqa", PIQA, {"label": True}, "0, 1"),
        ("boolq", BOOLQ, {"label": -1}, "0, 1"),
        ("boolq", BOOLQ, {"label": 2}, "0, 1"),
        ("winogrande", WINOGRANDE, {"answer": ""}, "'1', '2'"),
        ("winogrande", WINOGRANDE, {"answer": 1}, "'1', '2'"),
        ("hellaswag", HELLASWAG, {"label": ""}, "0, 1, 2, 3"),
        ("hellaswag", HELLASWAG, {"label": 4}, "0, 1, 2, 3"),
        ("arc_easy", ARC, {"answerKey": "C"}, "'A', 'B'"),
        ("arc_challenge", QUERY, {"gold": 2}, "0, 1"),
        ("boolq", QUERY, {"gold": -1}, "0, 1"),
        ("winogrande", PARTIAL, {"gold": 2}, "0, 1"),
        ("hellaswag", ENDINGS, {"label": -1}, "0, 1, 2"),
    ],
)
def test_a_row_without_a_valid_label(tmp_path, task, row, wrong, allowed):
    path = _write(tmp_path, f"{task}.jsonl", [row, row])
    found, rows, layout = tasks._documents(task, tmp_path)
    assert found == path
    assert rows == [row, row]
    assert set(layout.fields) <= set(row)
    _write(tmp_path, f"{task}.jsonl", [row, {**row, **wrong}, {**row, **wrong}])
    with pytest.raises(ValueError, match="expected in row 2 of") as refused:
        tasks.build_task(task, tmp_path)
    [got] = wrong.values()
    assert f"row 2 of {str(path)!r} a label among {allowed}, got {got!r}; " in str(refused.value)


@pytest.mark.parametrize("row", [{"goal": "g", "sol1": "a", "sol2": "b"}, {**PIQA, "sol2": None}])
def test_a_row_that_lacks_a_field(tmp_path, row):
    path = _write(tmp_path, "piqa.jsonl", [PIQA, PIQA, row])
    lacking = "label" if "label" not in row else "sol2"
    with pytest.raises(ValueError, match=f"expected {lacking} in row 3 of") as refused:
        tasks.build_task("piqa", tmp_path)
    assert repr(str(path)) in str(refused.value)


def test_fields_of_another_kind(tmp_path):
    _write(tmp_path, "arc_easy.jsonl", [{**ARC, "choices": ["x", "y"]}])
    with pytest.raises(ValueError, match=r"in row 1 of .* got another kind"):
        tasks.build_task("arc_easy", tmp_path)


def test_a_labelled_split_is_preferred(tmp_path):
    unlabelled = {**PIQA, "label": -1}
    test = _write(tmp_path, "piqa/test.jsonl", [unlabelled])
    validation = _write(tmp_path, "piqa/validation.jsonl", [PIQA])
    _write(tmp_path, "piqa/train.jsonl", [PIQA])
    assert tasks._documents("piqa", tmp_path)[0] == validation
    _write(tmp_path, "piqa/test.jsonl", [PIQA])
    assert tasks._documents("piqa", tmp_path)[0] == test


def test_without_a_labelled_split_the_first_one_is_named(tmp_path):
    unlabelled = {**PIQA, "label": -1}
    test = _write(tmp_path, "piqa/test.jsonl", [unlabelled])
    _write(tmp_path, "piqa/validation.jsonl", [PIQA, unlabelled])
    _write(tmp_path, "piqa/train.jsonl", [PIQA])  # nobody evaluates on that without saying so
    with pytest.raises(ValueError, match="expected in row 1 of") as refused:
        tasks.build_task("piqa", tmp_path)
    assert repr(str(test)) in str(refused.value)


def test_nan_likelihoods_are_no_choice():
    good = {"doc_id": 0, "filtered_resps": [(-1.0, False), (-math.inf, False)]}
    tasks._check_scores("piqa", [good])
    with pytest.raises(RuntimeError, match="got NaN in document 7 of piqa"):
        tasks._check_scores("piqa", [good, {"doc_id": 7, "filtered_resps": [(-1.0, False), (math.nan, False)]}])
    tasks._check_scores("ifeval", [{"doc_id": 0, "filtered_resps": ["text"]}])
