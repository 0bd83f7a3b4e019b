"""Multiple-choice scores without the harness are the harness's, document by document."""

import json

import pytest
import quality_choices as choices
import tiny_model

from nm_act.lab.evaluate.tasks import build_task, harness_model, run_task

ROWS = {
    "arc_easy": {"query": "Question: Which one is {}?", "choices": ["the sun ", "a cat", "blue water"], "gold": 1},
    "boolq": {"query": "Passage: text {}\nQuestion: is it?", "choices": ["no", "yes"], "gold": 0},
    "hellaswag": {"query": "A man {} walks. He", "choices": ["sits.", "runs away.", "eats.", "sleeps."], "label": 2},
    "piqa": {"goal": "open the {}", "sol1": "push it ", "sol2": "pull it with a hand", "label": 1},
    "winogrande": {"context_options": ["Anna helped {} so Anna", "Anna helped {} so Eva"], "continuation": "was glad."},
}


@pytest.mark.parametrize("task", ROWS)
def test_scores_are_those_of_the_harness(task, tmp_path):
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny_model.build()
    model.lm_head.weight.data *= 100
    rows = []
    for index, name in enumerate(("tree", "house of stone", "x", "river bank")):
        row = {key: _filled(value, name) for key, value in ROWS[task].items()}
        rows.append(row | ({"gold": index % 2} if task == "winogrande" else {}))
    (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = run_task(build_task(task, tmp_path)[0], harness_model(model, tokenizer, 2)).scores
    questions = [choices.CHOICES[task](row) for row in rows]
    for tokens in (1, 64, 10**6):  # alone, some together, all together
        answers = choices.tokenized(tokenizer, questions)
        assert choices.score(model, answers, [each.right for each in questions], tokens) == list(expected)


def _filled(value, name):
    if isinstance(value, list):
        return [each.format(name) for each in value]
    return value.format(name) if isinstance(value, str) else value


def test_nan_is_refused():
    model, tokenizer = tiny_model.build()
    model.lm_head.weight.data[:] = float("nan")
    question = choices.CHOICES["piqa"](ROWS["piqa"])
    with pytest.raises(RuntimeError, match="expected finite likelihoods from the model, got NaN"):
        choices.score(model, choices.tokenized(tokenizer, [question]), [question.right])
