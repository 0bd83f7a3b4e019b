"""The benchmark of a layer's host time: a row per pattern, and its refusal without CUDA."""

import bench_eager_overhead
import pytest
import torch
from conftest import csv_rows


def test_one_row_per_pattern(capsys, tmp_path):
    threads, out = torch.get_num_threads(), tmp_path / "overhead.csv"
    try:
        bench_eager_overhead.main(["--device", "cpu", "--pattern", "2:4", "8:16", "--blocks", "2", "--csv", str(out)])
    finally:
        torch.set_num_threads(threads)
    header, *rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [["cpu", "2:4"], ["cpu", "8:16"]]
    for row in rows:
        values = dict(zip(header, row, strict=True))
        assert float(values["linear_us"]) > 0
        assert float(values["nm_linear_us"]) > 0
    assert [[row[name] for name in header] for row in csv_rows(out)] == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal without CUDA")
def test_cuda_without_a_device(capsys):
    with pytest.raises(SystemExit):
        bench_eager_overhead.main(["--device", "cuda"])
    assert "use --device cpu" in capsys.readouterr().err
