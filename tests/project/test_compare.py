"""tools/compare.py: which rows are matched, what counts as slower, exit codes."""

from pathlib import Path

import compare
import pytest

ROOT = Path(__file__).resolve().parents[2]

HEADER = "bench,variant,tokens,us_p50,speedup,commit"


@pytest.fixture
def files(tmp_path):
    def write(old: list[str], new: list[str], header: str = HEADER) -> list[str]:
        paths = [tmp_path / "old.csv", tmp_path / "new.csv"]
        for path, rows in zip(paths, (old, new), strict=True):
            path.write_text("\n".join([header, *rows]) + "\n")
        return list(map(str, paths))

    return write


OLD = ["gemm,ours,1,10,1.0,a", "gemm,ours,8,20,1.0,a", "gemm,ours,64,40,1.0,a", "gemm,gone,1,1,1,a"]
NEW = ["gemm,ours,8,21,1.3,b", "gemm,ours,1,9,1.1,b", "gemm,ours,64,40.4,1.0,b"]


@pytest.mark.parametrize(
    ("threshold", "code", "summary", "shown"),
    [
        (3, 1, "3 rows compared, 1 slower and 1 faster by more than 3 %; 1 in one file only", ["+5.0 %", "-10.0 %"]),
        (7, 0, "3 rows compared, 0 slower and 1 faster by more than 7 %; 1 in one file only", ["-10.0 %"]),
        (20, 0, "3 rows compared, 0 slower and 0 faster by more than 20 %; 1 in one file only", []),
    ],
)
def test_what_changed_by_more_than_the_threshold(files, capsys, threshold, code, summary, shown):
    assert compare.main([*files(OLD, NEW), "--threshold", str(threshold)]) == code
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == summary
    assert [text for text in ("+5.0 %", "-10.0 %", "+1.0 %") if text in printed] == shown


def test_a_rate_that_falls_is_slower(files):
    changes, _, _ = compare.compare(
        *files(["a,ttft_ms,100", "a,decode_tok_s,100"], ["a,ttft_ms,80", "a,decode_tok_s,80"], "mode,metric,p50")
    )
    assert [(change.key[1], round(change.slower)) for change in changes] == [("decode_tok_s", 25), ("ttft_ms", -20)]


def test_repeated_rows_count_by_their_median(files):
    [change], _, _ = compare.compare(*files(["a,10", "a,30", "a,11"], ["a,22"], "bench,us_p50"))
    assert (change.old, change.new, change.slower) == (11, 22, 100)


def test_a_column_that_came_later_is_empty_in_the_old_file(files):
    old, new = files(OLD, [])
    rows = [",".join([*row.split(",")[:3], "", *row.split(",")[3:]]) for row in NEW]
    header = HEADER.replace("tokens", "tokens,paced")
    Path(new).write_text("\n".join([header, *rows, "gemm,ours,8,paced,19,1.3,b"]) + "\n")
    changes, columns, alone = compare.compare(old, new)
    assert columns == ["bench", "variant", "tokens", "paced"]
    assert {change.key[2:]: (change.old, change.new) for change in changes} == {
        ("1", ""): (10, 9),
        ("8", ""): (20, 21),
        ("64", ""): (40, 40.4),
    }
    assert alone == 2


@pytest.mark.parametrize(
    ("old", "new", "header", "told"),
    [
        (OLD, ["gemm,other,1,1,1,b"], HEADER, "expected rows of the same cases"),
        (["a"], ["a"], "bench", "expected rows with us_p50 or p50"),
        ([], [], HEADER, "expected rows with us_p50 or p50"),
    ],
)
def test_files_that_cannot_be_compared(files, capsys, old, new, header, told):
    assert compare.main(files(old, new, header)) == 2
    assert told in capsys.readouterr().err


def test_other_columns_and_a_missing_file_are_told(files, tmp_path, capsys):
    old, new = files(OLD, NEW)
    Path(new).write_text("bench,us_p50\na,1\n")
    assert compare.main([old, new]) == 2
    assert "expected equal key columns" in capsys.readouterr().err
    assert compare.main([old, str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/results/*/*.csv")), ids=lambda path: path.name)
def test_every_committed_file_of_timings_equals_itself(path, capsys):
    assert compare.main([str(path), str(path)]) == 0
    assert " 0 slower and 0 faster" in capsys.readouterr().out
