"""The table of the measurements page, which `benchmarks/all.py --summary` makes from the files of the processors."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("benchmarks_all", ROOT / "benchmarks" / "all.py")
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)


def test_the_page_has_the_ratios_of_the_files():
    page = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    assert benchmark.with_summary(page, benchmark.summary(benchmark.result_files())) == page


def test_a_processor_is_of_the_class_of_its_widest_products():
    flags = "fpu avx2 avx512f avx512_bf16"
    assert benchmark.processor_class(f"{flags} amx_bf16") == "amx"
    assert benchmark.processor_class(flags) == "avx512_bf16"
    assert benchmark.processor_class("fpu avx2 fma") == "avx2"
    assert benchmark.processor_class("fpu neon") == "other"


def test_rows_of_two_processors_become_columns(tmp_path):
    row = benchmark.Row(what="decode, batch 1, tokens/s", ours=3, theirs=2, peer="theirs", spread=1.1, peak=2e9)
    other = benchmark.Row(what="block, ms", ours=1e-5, theirs=2e-5, peer="limit", spread=1)
    for name, rows in (("avx2", [row]), ("amx", [row, other])):
        text = benchmark.report(rows, "a processor", 720, (0.1, 2.0))
        (tmp_path / f"cpu-{name}.md").write_text(text, encoding="utf-8")
    table = benchmark.summary([tmp_path / "cpu-avx2.md", tmp_path / "cpu-amx.md"]).splitlines()
    assert table[0] == "| what | theirs is | avx2 | amx |"
    assert table[2:] == ["| decode, batch 1, tokens/s | theirs | 1.50 | 1.50 |", "| block, ms | limit | – | 0.50 |"]


def test_the_readme_shows_rows_of_one_kind_together(tmp_path):
    decode = [
        benchmark.Row(what=f"decode, float32, batch {n}, tokens/s", ours=n, theirs=2, peer=benchmark.TORCH, spread=1)
        for n in (1, 8)
    ]
    (tmp_path / "cpu-avx2.md").write_text(benchmark.report(decode, "a processor", 720, (0.1, 2.0)), encoding="utf-8")
    table = benchmark.short_summary([tmp_path / "cpu-avx2.md"]).splitlines()
    assert table[2:] == ["| decode, float32, batch 1 / 8 / 32 (tokens/s) | 0.50 / 4.00 / – |"]


def test_the_readme_has_the_ratios_of_the_files():
    page, files = (ROOT / "README.md").read_text(encoding="utf-8"), benchmark.result_files()
    assert not files or benchmark.with_summary(page, benchmark.short_summary(files)) == page
