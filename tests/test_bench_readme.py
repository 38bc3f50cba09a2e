"""The README's table of what was measured on GPUs. Every number here is made up: see `bench_fabricated`."""

import json

import bench_fabricated as fake
import pytest

from fqt.cli import UsageError
from fqt.suites import CONVOLUTIONS, SUITES
from fqt_bench import convs, readme, wholes
from fqt_bench.reading import Refused
from fqt_bench.wholes import Whole

SHAPE = "8192x28672x4096"


def _product(shape=SHAPE, dispatched=0.8, **fields):
    """bf16 takes 1 ms, what dispatch takes `dispatched`, another configuration 0.5 ms."""
    value = 1 / dispatched
    mine = {"tag": "portable", "ratio": (value, 0.97 * value, 1.02 * value), "tops": 800.0}
    return fake.case(
        "gemm", shape, fake.candidate("torch.matmul bf16", 1.0, tag="bf16", ours=False, provider="torch"),
        fake.candidate("torch._int_mm (int32 out)", 0.4, tag="_int_mm", ours=False, provider="torch"),
        fake.candidate("hopper 128x256x128", 0.5, tag="hopper"),
        fake.candidate("portable 128x128x128 (dispatch)", dispatched, **{**mine, **fields}),
    )  # fmt: skip


def _layer(compiled, int8, shape=SHAPE):
    """bf16 takes 1 ms."""
    torch = {"ours": False, "provider": "torch"}
    return fake.case(
        "linear fwd+bwd", shape, fake.candidate("nn.Linear bf16", 1.0, tag="bf16", **torch),
        fake.candidate("fqt.nn.Linear int8", int8, tag="int8", ratio=(1 / int8, 0.5, 9.0), tops=500.0),
        fake.candidate("nn.Linear bf16, torch.compile", compiled, tag="bf16 compiled", **torch),
        fake.candidate("torchao", 2.0, tag="torchao", ours=False, provider="torchao"),
        fake.failed("torchao fp8", "wrong", "nothing was quantized", tag="torchao fp8", ours=False, provider="torchao"),
    )  # fmt: skip


def _tables(text):
    """Of each table the rows as {column: entry}."""
    tables = [
        [line.strip("|").split("|") for line in part.splitlines()] for part in text.split("\n\n") if part[0] == "|"
    ]
    cells = [[[cell.strip() for cell in line] for line in table] for table in tables]
    return [[dict(zip(table[0], row, strict=True)) for row in table[2:]] for table in cells]


def _block(*results):
    return readme.block(fake.runs(*results))


# ---- the table


def test_the_readme_has_the_table_that_the_committed_results_give():
    assert readme.main(["--check"]) == 0


def test_without_a_result_of_a_gpu_nothing_is_measured():
    for results in (
        (),
        (fake.on_cpu(_product()),),
        (fake.result(fake.case("quantize", "8x8", fake.candidate("copy"))),),
    ):
        assert _block(*results) == readme.NOTHING and readme.NOTHING.startswith("Not measured on a GPU yet.")


def test_a_row_of_a_product_is_what_dispatch_takes_beside_the_others():
    (((row,),)) = _tables(_block(fake.result(_product())))
    assert row == {"M × N × K": "8192 × 28672 × 4096", "of": "Llama-8B w13", "bf16, ms": "1.00", "fqt int8, ms": "0.800",
                   "int8 over bf16": "1.25 (1.21 to 1.27)", "TOPS": "800", "fastest of fqt's": "2.00",
                   "`torch._int_mm`": "2.50"}  # fmt: skip


def test_where_int8_loses_the_row_is_there_and_counted():
    text = _block(fake.result(_product(), _product("64x4096x4096", dispatched=4.0, starved=3)))
    loss, gain = _tables(text)[0]
    assert (loss["int8 over bf16"], gain["int8 over bf16"]) == ("0.25 (0.24 to 0.26)", "1.25 (1.21 to 1.27)")
    assert loss["fqt int8, ms"] == "4.00 (host-bound)" and "int8 is faster in 1 of 2:" in text


def test_a_layer_is_compared_with_the_faster_of_eager_and_compiled():
    """The recorded interval is of the ratio to eager alone; the samples of a round give that to the compiled one."""
    ((eager,),) = _tables(_block(fake.result(_layer(compiled=1.5, int8=0.8))))
    ((compiled,),) = _tables(_block(fake.result(_layer(compiled=0.5, int8=0.8))))
    assert (eager["bf16, ms"], eager["int8 over bf16"]) == ("1.00", "1.25 (0.50 to 9.00)")
    assert compiled["bf16, ms"] == "0.500" and compiled["int8 over bf16"].startswith("0.62 (0.")
    low, high = (float(end) for end in compiled["int8 over bf16"][6:-1].split(" to "))
    assert 0.55 < low <= 0.63 and 0.62 <= high < 0.7  # 3 samples, within 4 %
    assert (eager["torchao int8"], compiled["torchao int8"]) == ("0.50", "0.25")
    assert "torchao fp8" not in eager  # wrong: no figure, and a column without one is left out


def test_what_failed_has_no_figure_and_a_case_without_any_is_left_out():
    case = _product()
    failed = fake.failed("portable (dispatch)", "wrong", "3 elements differ", tag="portable")
    half = {**case, "candidates": [case["candidates"][0], failed]}
    none = {**case, "shape": "8x8x8", "candidates": [failed]}
    ((row,),) = _tables(_block(fake.result(half, none)))
    assert row["bf16, ms"] == "1.00" and row["M × N × K"].startswith("8192") and "int8 over bf16" not in row


def test_what_bhq_costs_has_rows_with_its_target_and_without_such_a_result_there_are_none():
    times = {"product": 2.0, "psq whole": 2.5, "whole global": 2.68, "whole tile": 2.75}
    case = fake.case("householder", "8192x8192x8192", *(fake.candidate(tag, ms, tag=tag) for tag, ms in times.items()))
    first, second = (line.strip("| ").split(" | ") for line in _block(fake.result(case)).splitlines()[-2:])
    assert first == ["T8", "BHQ beyond PSQ, of dgrad at 8192³", "9 %", "≤ 10 %", "met"]
    assert second == ["T8", "BHQ in tiles beyond PSQ, of dgrad at 8192³", "12 %", "≤ 10 %", "missed"]
    assert "T8" not in _block(fake.result(_product())) and "Convolutions" not in _block(fake.result(_product()))


def test_convolutions_are_summed_by_their_count_where_every_one_was_measured():
    def of(network, some, slow=0):
        bf16, times = fake.candidate("nn.Conv2d", 3.0, tag="bf16"), [6.0] * slow + [1.5] * (len(some) - slow)
        return [fake.case(convs.title(network), convs.size(layer), bf16, fake.candidate("int8", ms, tag="int8",
                prediction="1.20× (datasheet)"))
                for layer, ms in zip(some, times, strict=True)]  # fmt: skip

    layers = CONVOLUTIONS["ResNet-50"]
    count = sum(layer.count for layer in layers)
    ours = 1.5 * count + 4.5 * layers[0].count
    text = _block(fake.result(*of("ResNet-50", layers, slow=1)))
    assert f"int8 is faster in {len(layers) - 1} of {len(layers)} shapes, all {count} convolutions" in text
    assert f"instead of {3 * count} ({3 * count / ours:.2f}×)" in text and count == 53
    assert f"the cost model was wrong about int8 in 1 of {len(layers)}." in text
    part = _block(fake.result(*of("ResNet-50", layers[1:])))
    assert f"int8 is faster in {len(layers) - 1} of {len(layers) - 1} shapes" in part and "together" not in part


def test_each_gpu_is_apart_under_its_versions_date_and_commit():
    other = {"gpu": "FABRICATED A100", "driver": "111.22", "torch": "2.11.0", "triton": "3.6.0"}
    text = _block(fake.result(_product()), fake.result(_product(), environment={**other, "dirty": True}))
    first, second = text.split("### ")[1:]
    assert first.splitlines()[0] == "FABRICATED A100" and second.splitlines()[0] == fake.H100
    assert "driver 111.22, torch 2.11.0, Triton 3.6.0, 2026-03-01, commit 012345678 with changes." in first
    assert "driver 000.00, torch 2.13.0, Triton 3.7.1, 2026-03-01, commit 012345678." in second
    assert len(_tables(text)) == 2


def test_each_shape_is_of_the_newest_run_that_has_it():
    later = {"date": "2026-04-01T10:00:00+00:00", "torch": "2.14.0"}
    text = _block(
        fake.result(_product(), _product("64x64x64")), fake.result(_product(dispatched=0.5), environment=later)
    )
    small, large = _tables(text)[0]
    assert (small["run"], small["fqt int8, ms"], large["run"], large["fqt int8, ms"]) == ("1", "0.800", "2", "0.500")
    assert "(1) driver 000.00, torch 2.13.0, " in text and "(2) driver 000.00, torch 2.14.0, " in text


def test_the_shapes_of_networks_have_their_names():
    names = readme._names("gemm")
    assert names[4096, 6144, 4096] == "Llama-8B qkv" and names[50432, 1024, 4096] == "ViT-L/16 fc2"
    assert names[8192, 4096, 28672] == "Llama-8B w13, dgrad" and names[28672, 4096, 8192] == "Llama-8B w13, wgrad"
    assert names[256, 1000, 1024] == "ViT-L/16 head" and (8192, 4096, 28672) not in readme._names("linear fwd+bwd")
    for suite in readme.NETWORKS:
        assert {layer[1:] for layer in SUITES[suite]} <= names.keys()


def test_text_of_a_result_is_no_markup():
    text = _block(fake.result(_product(), environment={"gpu": "X<img src=x>|[a](b)", "driver": "1|<!-- 2 -->"}))
    assert "### X\\<img src=x\\>\\|\\[a\\](b)" in text and "<!--" not in text


# ---- the file


@pytest.fixture
def place(tmp_path):
    """Results of a GPU, of the CPU, and what else lies there; and a file with the markers."""
    for name, result in (("gpu", fake.result(_product())), ("cpu", fake.on_cpu(_product()))):
        (tmp_path / "results" / name).mkdir(parents=True)
        fake.written(tmp_path / "results" / name, result)
    (tmp_path / "results" / "gpu" / "hardware.json").write_text('{"kind": "parts"}')
    (tmp_path / "README.md").write_text(f"before\n\n{readme.BEGIN}\nold\n{readme.END}\n\nafter\n")
    return tmp_path


def _run(place, *options):
    return readme.main([*options, "--results", str(place / "results"), "--out", str(place / "README.md")])


def test_check_refuses_another_table_and_write_puts_the_right_one(place, capsys):
    path = place / "README.md"
    before = path.read_text()
    assert _run(place, "--check") == 1 and path.read_text() == before
    assert "its table is not what the results give: python -m fqt_bench.readme --write" in capsys.readouterr().err
    assert _run(place, "--write") == 0 and _run(place, "--check") == 0
    assert capsys.readouterr() == ("", "")  # what is no result of a benchmark is none of its business
    text = path.read_text()
    assert text.startswith(f"before\n\n{readme.BEGIN}\n\n{readme.ABOUT}\n\n### ") and text.endswith(
        f"{readme.END}\n\nafter\n"
    )
    assert _run(place, "--write") == 0 and path.read_text() == text
    assert _run(place) == 0 and path.read_text() == text  # only prints
    assert capsys.readouterr().out.strip() in text
    path.write_text(text.replace("0.800", "0.799"))
    assert _run(place, "--check") == 1


def test_the_folder_of_one_gpu_will_do(place, capsys):
    for folder in ("results", "results/gpu"):
        assert readme.main(["--results", str(place / folder)]) == 0
        assert f"### {fake.H100}" in capsys.readouterr().out


def test_a_result_of_another_schema_is_said(place, capsys):
    (place / "results" / "gpu" / "1.json").write_text('{"schema": 2, "cases": []}')
    assert _run(place, "--write") == 0
    assert "1.json: schema 2, and this reads schema 3 alone" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", readme.BEGIN, f"{readme.END}{readme.BEGIN}", 2 * (readme.BEGIN + readme.END)])
def test_a_file_without_the_markers_is_a_mistake(place, text, capsys):
    (place / "README.md").write_text(text)
    for option in ("--check", "--write"):
        assert _run(place, option) == 2 and "needs one line" in capsys.readouterr().err
    assert (place / "README.md").read_text() == text


def test_a_folder_or_a_file_that_is_not_there_is_a_mistake(place, capsys):
    assert readme.main(["--results", str(place / "none")]) == 2 and "no such folder" in capsys.readouterr().err
    (place / "README.md").unlink()
    assert _run(place, "--check") == 2 and "README.md" in capsys.readouterr().err


# ---- whole training steps


def _whole(date="2026-01-02", gpu="H100", int8_ms=400.0, quick=False):
    def candidate(name, ms, **fields):
        ratio = {"exact": {"value": 500.0 / ms}, "exact compiled": {"value": 450.0 / ms}}
        return {"name": name, "status": "ok", "remark": "", "ms": {"median": ms}, "items_s": 8192e3 / ms, "peak": 3 * 2**30,
                "ratio": ratio, **fields}  # fmt: skip

    lost = {"name": "torchao", "status": "out of memory", "remark": "CUDA is full"}
    network = {"title": "12 blocks", "shape": "8192x4096", "unit": "tokens",
               "candidates": [candidate("torch bf16", 500.0), candidate("fqt int8", int8_ms), lost]}  # fmt: skip
    env = {"gpu": gpu, "date": date, "driver": "1", "torch": "2", "triton": "3", "commit": "abc"}
    return {"kind": "end to end", "environment": env, "arguments": {"quick": quick}, "networks": [network]}


def test_whole_steps_have_their_times_ratios_rates_and_reasons():
    text = readme.block([], [Whole.of(_whole())])
    (table,) = _tables(text)
    assert table[1] == {"network": "12 blocks, 8192x4096", "": "fqt int8", "ms a step": "400", "over bf16": "1.25",
                        "over bf16, compiled": "1.12", "a second": "20480 tokens", "peak, GiB": "3.0"}  # fmt: skip
    assert "out of memory: CUDA is full" in text and "driver 1, torch 2, Triton 3, 2026-01-02, commit abc." in text


def test_of_each_gpu_the_newest_whole_steps_count_and_toy_sizes_never():
    some = [_whole("2026-01-03", int8_ms=100.0), _whole("2026-01-02"), _whole(gpu="A100")]
    text = readme.block([], map(Whole.of, some))
    assert [row["ms a step"] for table in _tables(text) for row in table if row[""] == "fqt int8"] == ["400", "100"]
    assert readme.block([], map(Whole.of, [_whole(quick=True), _whole(gpu=None)])) == readme.NOTHING


def test_the_report_has_the_whole_steps_of_a_gpu_and_refuses_what_is_no_whole_result(tmp_path, capsys):
    fake.written(tmp_path, fake.GOOD)
    whole = _whole()
    whole["networks"][0]["candidates"][1]["name"] = "fqt <b>int8</b>\n"
    (tmp_path / "end-to-end-a.json").write_text(json.dumps(whole))
    assert fake.report(tmp_path, "--out", tmp_path / "out") == 0
    page, text = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "Whole training steps" in page and "20480 tokens" in page and "fqt &lt;b&gt;int8" in page
    assert "20480 tokens" in text and "<b>int8" not in page + text
    assert "Whole training steps on a GPU: not measured." not in text
    del whole["networks"][0]["candidates"][1]["peak"]
    (tmp_path / "end-to-end-a.json").write_text(json.dumps(whole))
    assert fake.report(tmp_path, "--out", tmp_path / "out") == 1
    assert "end-to-end-a.json: no whole result of whole training steps: KeyError: 'peak'" in capsys.readouterr().err
    (tmp_path / "end-to-end-a.json").unlink()
    assert fake.report(tmp_path, "--out", tmp_path / "out") == 0
    assert "Whole training steps on a GPU: not measured." in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("figure", ["10" * 200, "1e999"])
@pytest.mark.parametrize("field", ["peak", "items_s"])
def test_a_figure_that_no_machine_has_is_refused(figure, field, tmp_path):
    whole = _whole()
    whole["networks"][0]["candidates"][0][field] = 123456789
    (tmp_path / "a.json").write_text(json.dumps(whole).replace("123456789", figure))
    with pytest.raises(Refused, match="no whole result"):
        wholes.read(tmp_path / "a.json")


def test_what_is_nested_too_deep_is_refused(tmp_path):
    whole = json.dumps(_whole() | {"more": 1}).replace('"more": 1', f'"more": {"[" * 960}{"]" * 960}')
    (tmp_path / "a.json").write_text(whole)
    with pytest.raises(Refused):
        wholes.read(tmp_path / "a.json")
    assert wholes.among([(tmp_path / "a.json", "not a result of fqt bench")])[0] == []


def test_whole_steps_alone_are_no_report_and_those_not_shown_are_said(tmp_path, capsys):
    (tmp_path / "whole.json").write_text(json.dumps(_whole(quick=True)))
    with pytest.raises(UsageError, match="only of fqt_bench"):
        fake.report(tmp_path / "whole.json", "--out", tmp_path / "out")
    assert "1 of 1 results of whole training steps are not shown" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["title", "shape", "unit"])
def test_a_number_where_text_belongs_is_refused_or_shown_as_text(field):
    whole = _whole()
    whole["networks"][0][field] = 5
    assert all(isinstance(cell, str) for row in Whole.of(whole).rows for cell in row)
    whole["networks"][0]["candidates"][0]["name"] = 5
    with pytest.raises(Refused, match="a number where"):
        Whole.of(whole)


def test_a_file_that_is_no_result_of_whole_steps_is_said(tmp_path, capsys):
    (folder := tmp_path / "h100").mkdir()
    for name, text in (("a", json.dumps(_whole())), ("b", "{"), ("c", '{"kind": "study"}'), ("d", "[]")):
        (folder / f"end-to-end-{name}.json").write_text(text)
    assert readme.whole_results(tmp_path) == [Whole.of(_whole())]
    said = capsys.readouterr().err
    assert all(f"end-to-end-{name}.json" in said for name in "bcd") and "end-to-end-a" not in said
