"""Tables of whole models: energies that no card can draw are left out, e4m3 is compared with its stronger baseline."""

import speed_tables

H100 = "NVIDIA H100 80GB HBM3"


def row(metric, p50, *, mode="nm-8:16-fp8", baseline="dense_bf16", speedup=1.0, prompt=512, device=H100):
    common = {"model": "m", "batch": "1", "device": device, "prompt": str(prompt)}
    return common | {"mode": mode, "baseline": baseline, "metric": metric, "p50": str(p50), "speedup": f"{speedup:.3f}"}


def test_energies_are_shown_where_the_card_can_draw_the_power():
    times = [row("ttft_ms", 100), row("decode_tok_s", 200), row("ttft_ms", 10, prompt=64)]
    energies = [row("ttft_j", 69), row("decode_j_tok", 1.7), row("ttft_j", 3, prompt=64)]
    assert speed_tables.watts(times + energies, "ttft_j") == [690.0, 300.0]
    assert speed_tables.watts(times + energies, "decode_j_tok") == [340.0]
    assert list(speed_tables.possible_energies(times + energies)) == ["ttft_j", "decode_j_tok"]
    impossible = [*energies[:2], row("ttft_j", 9.95, prompt=64)]
    assert speed_tables.possible_energies(times + impossible) == {}
    assert list(speed_tables.possible_energies(times + energies[:1])) == ["ttft_j"]
    assert speed_tables.possible_energies([each | {"device": "unknown"} for each in times + energies]) == {}
    assert speed_tables.possible_energies(times) == {}


def test_e4m3_is_compared_with_its_stronger_baseline():
    rows = [
        row("decode_tok_s", 368, baseline="dense_bf16", speedup=2.4),
        row("decode_tok_s", 368, baseline="dense_fp8", speedup=2.0),
        row("decode_tok_s", 368, baseline="dense_fp8_gather", speedup=1.5),
    ]
    assert [each["baseline"] for each in speed_tables.against(rows)] == ["dense_bf16", "dense_fp8_gather"]
    assert speed_tables.gain(rows) == "2.40x (1.50x)"
    assert speed_tables.gain(rows[:1]) == "2.40x"
    own = [row("decode_tok_s", 155, mode="dense_bf16")]
    assert speed_tables.against(own) == []
    assert speed_tables.gain(own) == "1.00x"
