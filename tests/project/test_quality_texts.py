"""benchmarks/quality_texts.py writes the texts that were measured, and no others."""

import hashlib
from pathlib import Path

import pytest
import quality_texts

ROOT = Path(__file__).parents[2]

CODE = '"""Parser"""\n\nimport re\n'
FRENCH = "Il vient.\nElle\u2028part.\nÀ demain.\n"
PARTS = {
    "test": "# sent_id = 1\n# text = Il vient.\n1\tIl\til\n2\tvient\tvenir\n\n# text_en = It\n# text = Elle\u2028part.\n",
    "dev": "# text = À demain.\n1\tÀ\tà\n",
}


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "argparse.py").write_bytes(CODE.encode())
    for part, content in PARTS.items():
        # A checkout of another system: carriage returns are no part of the text.
        (tmp_path / f"fr_gsd-ud-{part}.conllu").write_bytes(content.replace("\n", "\r\n").encode())
    return ["--argparse", str(tmp_path / "argparse.py"), "--treebank", str(tmp_path), "--output", str(tmp_path / "out")]


@pytest.fixture
def measured(monkeypatch):
    for name, text in {"code": CODE, "french": FRENCH}.items():
        monkeypatch.setitem(quality_texts.SHA256, name, hashlib.sha256(text.encode()).hexdigest())


def test_code_as_it_is_and_sentences_of_test_then_dev(sources, measured, tmp_path, capsys):
    assert quality_texts.main(sources) == 0
    assert (tmp_path / "out" / "code.txt").read_bytes() == CODE.encode()
    assert (tmp_path / "out" / "french.txt").read_bytes() == FRENCH.encode()
    assert f"{quality_texts.SHA256['french']}  {tmp_path / 'out' / 'french.txt'}" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "source"), [("argparse.py", "argparse.py"), ("fr_gsd-ud-dev.conllu", "GSD r2.16")])
def test_another_release_is_refused_and_nothing_written(sources, measured, tmp_path, capsys, name, source):
    with (tmp_path / name).open("a") as file:
        file.write("# text = more\n")
    assert quality_texts.main(sources) == 2
    error = capsys.readouterr().err
    assert source in error
    assert "take the source from that release" in error
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read(sources, measured, tmp_path, capsys):
    (tmp_path / "argparse.py").write_bytes(b"# caf\xe9\n")
    assert quality_texts.main(sources) == 2
    assert "expected UTF-8 text" in capsys.readouterr().err
    (tmp_path / "argparse.py").unlink()
    assert quality_texts.main(sources) == 2
    assert "no such file or directory; check the path" in capsys.readouterr().err


def test_the_documentation_has_the_hashes():
    text = (ROOT / "docs" / "evaluate.md").read_text()
    assert all(digest in text for digest in quality_texts.SHA256.values())
