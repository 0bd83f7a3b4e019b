"""Texts and data sets: files by name, rows, text files, tokens."""

import json

import pytest
import tiny_model
import torch

from nm_act.lab import texts
from nm_act.lab.texts import read_text, tokenize
from nm_act.supported import require


def test_files_are_found_by_name_folder_and_split(tmp_path):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "train.jsonl").write_text("{}")
    (tmp_path / "boolq" / "validation.jsonl").write_text("{}")
    (tmp_path / "boolq" / "SOURCES.md").write_text("not data")
    (tmp_path / "piqa.jsonl").write_text("{}")
    assert texts.find_file(tmp_path, "boolq").name == "validation.jsonl"
    assert texts.find_file(tmp_path, "piqa").name == "piqa.jsonl"
    with pytest.raises(FileNotFoundError, match=r"no data for winogrande in .*: expected winogrande\.jsonl"):
        texts.find_file(tmp_path, "winogrande")
    with pytest.raises(FileNotFoundError, match="expected a data folder, but there is none"):
        texts.find_file(tmp_path / "missing", "boolq")
    (tmp_path / "arc").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "arc" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"expected one file for arc in .*, got arc/a\.jsonl, arc/b\.jsonl"):
        texts.find_file(tmp_path, "arc")


@pytest.mark.parametrize("content", ["", "[1]", "nonsense", '{"a": 1}\n3'])
def test_rows_that_are_no_objects(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"expected (JSON|a list of objects) in .*a\.jsonl"):
        texts.read_rows(tmp_path / "a.jsonl")


def test_tokenize(tiny):
    _, tokenizer = tiny
    ids = tokenize(tokenizer, tiny_model.TEXT)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids) == tiny_model.TEXT
    assert torch.equal(tokenize(tokenizer, tiny_model.TEXT, 9), ids[:9])
    with pytest.raises(ValueError, match="expected at least 2 tokens to evaluate on, got 1"):
        tokenize(tokenizer, tiny_model.TEXT, 1)


def test_read_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve\r\n".encode())
    assert read_text(tmp_path / "a.txt") == "naïve\r\n"
    # U+2028 ends a line for str.splitlines, but stands unescaped inside JSON strings.
    rows = [{"text": "one\u2028more"}, {"text": "two", "id": 2}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    assert read_text(tmp_path / "a.jsonl") == "one\u2028more\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff", "expected UTF-8 text in .*, another encoding at byte 2; convert it"),
        ("a.txt", b" \n", "expected text in .*, but there is none"),
        ("a.jsonl", b"", "but there is none"),
        ("a.jsonl", b'{"text": "x"}\nno json', 'expected an object with a "text" field on line 2'),
        ("a.jsonl", b'{"content": "x"}', "on line 1"),
        ("a.jsonl", b'["x"]', "on line 1"),
        ("a.jsonl", b'{"text": 3}', "on line 1"),
    ],
)
def test_bad_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / name)


def test_no_text_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot read '.*missing': no such file or directory"):
        read_text(tmp_path / "missing")
    with pytest.raises(ValueError, match="is a folder; name a file inside it"):
        read_text(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"The fox")
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "The fox"}\n')
    (tmp_path / "only.txt").write_bytes(mark)
    assert read_text(tmp_path / "a.txt") == "The fox"
    assert read_text(tmp_path / "a.jsonl") == "The fox"
    assert texts.read_rows(tmp_path / "a.jsonl") == [{"text": "The fox"}]
    with pytest.raises(ValueError, match=r"expected text in .*, but there is none"):
        read_text(tmp_path / "only.txt")


def test_rows_of_json_are_texts_too_and_what_has_none_is_named(tmp_path):
    (tmp_path / "c4.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    assert read_text(tmp_path / "c4.json") == "a\n\nb"
    assert texts.load_text("c4", tmp_path) == ("a\n\nb", "c4.json")
    (tmp_path / "c4.json").write_text(json.dumps([{"text": "a"}, {"text": None}]))
    with pytest.raises(ValueError, match=r'expected an object with a "text" field on row 2 of .*c4\.json'):
        texts.load_text("c4", tmp_path)


def test_splits_in_the_order_of_preference(tmp_path):
    (tmp_path / "piqa").mkdir()
    for name in ("train", "validation", "test"):
        (tmp_path / "piqa" / f"{name}.jsonl").write_text("{}")
    assert [path.stem for path in texts.find_splits(tmp_path, "piqa")] == ["test", "validation"]
    assert texts.find_file(tmp_path, "piqa").stem == "test"


@pytest.mark.parametrize("extra", ["eval", "demo"])
def test_a_missing_package_is_named_with_the_extra_that_installs_it(extra):
    told = rf"^expected the package nonsense for the plot, found none; install it with: pip install -e '\.\[{extra}\]' in a checkout of nm_act$"
    with pytest.raises(ImportError, match=told):
        require("nonsense.figure", extra, "the plot")
