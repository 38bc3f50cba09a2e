"""The cost model's identities, its monotonicities, and what it refuses to predict."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fqt import collect, cost, tuned, tuned_cost
from fqt.cost import Ceilings, NotModelled
from fqt.dispatch import Choice
from fqt.recipe import Quantizer, Recipe
from fqt.suites import Layer
from fqt.tuned import Entry, Table, Timing

INT8 = Recipe.int8()
H100 = ("NVIDIA H100 80GB HBM3", "sm90", 132)
A100 = ("NVIDIA A100-SXM4-80GB", "sm80", 108)


def ceilings(int8_tops=1200.0, tb_s=3.0, bf16_tflops=798.0, **fields):
    """Those of an H100: bf16 and bandwidth as measured on one, int8 as hoped for."""
    return Ceilings(bf16_tflops, int8_tops, None, tb_s, "measured", **fields)


def ratio(m, n, k, recipe=INT8, **rates):
    return cost.linear(m, n, k, recipe, ceilings(**rates)).ratio


# ---- identities


@pytest.mark.parametrize(
    ("shape", "int8_tops", "expected"),
    [
        ((8192, 8192, 8192), 1200, 1.35),
        ((8192, 8192, 8192), 1450, 1.60),
        ((4096, 4096, 4096), 1200, 1.22),
        ((8192, 28672, 4096), 1200, 1.32),  # Llama-8B w13
        ((8192, 4096, 14336), 1200, 1.34),  # w2
        ((50432, 4096, 1024), 1200, 1.03),  # the wide layer of ViT-L/16, batch 256
    ],
)
def test_the_ratios_of_the_design(shape, int8_tops, expected):
    assert ratio(*shape, int8_tops=int8_tops) == pytest.approx(expected, abs=0.005)  # two decimals


@pytest.mark.parametrize(("recipe", "a", "c"), [(INT8, 4, 4), (Recipe.psq(8), 6, 6), (Recipe.ptq(2), 6, 6)])
def test_the_prediction_is_the_formula(recipe, a, c):
    m, n, k = 8192, 6144, 4096
    got = cost.linear(m, n, k, recipe, ceilings())
    assert got.bf16_ms == pytest.approx(6 * m * n * k / 798e12 * 1e3)
    assert got.bytes == a * m * k + 6 * m * n + c * n * k
    assert got.ms == pytest.approx((6 * m * n * k / 1200e12 + got.bytes / 3.0e12) * 1e3)
    assert got.ratio == pytest.approx(got.bf16_ms / got.ms) and str(got) == f"{got.ratio:.2f}× (measured)"


def test_the_bytes_of_an_operand_follow_its_own_quantizer():
    row, tensor = Quantizer(8, "per_row"), Quantizer(8)
    gradients = {"dgrad": INT8.dgrad, "wgrad": INT8.wgrad}
    assert cost.traffic(Recipe(x=row, w=tensor, **gradients)) == {"X": (4, 1), "W": (6, 3), "dY": (6, 4)}
    assert cost.traffic(Recipe(x=tensor, w=row, **gradients)) == {"X": (6, 3), "W": (4, 1), "dY": (6, 4)}
    apart = Recipe(x=row, w=row, dgrad=row, wgrad=Quantizer(8, "per_column"))  # nearest: no kernel for both
    assert cost.traffic(apart)["dY"] == (3 + 5, 1 + 3)


def test_the_width_that_breaks_even_is_where_the_saved_operations_pay_for_the_bytes():
    """Many samples, N = K = d: 6·d·(1/R_bf16 - 1/R) = (a + b) / BW; about 1.85k at 1050 TOPS, 1.3k at 1200."""
    for tops, width in ((1050, 1847), (1200, 1323)):
        exact = 10 / 3.0e12 / (6 * (1 / 798e12 - 1 / (tops * 1e12)))
        assert exact == pytest.approx(width, abs=1)
        below, above = (ratio(2**30, d, d, int8_tops=tops) for d in (width - 5, width + 5))
        assert below < 1 < above


# ---- monotonicities and bounds


def test_wider_layers_faster_products_and_faster_memory_raise_the_ratio():
    for values in ([ratio(8192, d, d) for d in (512, 1024, 2048, 4096, 8192, 16384)],
                   [ratio(4096, 4096, 4096, int8_tops=tops) for tops in (600, 900, 1200, 1500)],
                   [ratio(4096, 4096, 4096, tb_s=tb_s) for tb_s in (1.0, 2.0, 4.0, 8.0)]):  # fmt: skip
        assert values == sorted(values) and len(set(values)) == len(values)


@pytest.mark.parametrize("size", [1024, 4096, 16384])
def test_the_ratio_never_exceeds_that_of_the_rates(size):
    assert ratio(size, size, size) < 1200 / 798
    assert ratio(size, size, size, int8_tops=798) < 1


def test_a_product_that_memory_bounds_takes_the_time_of_its_bytes():
    fprop = cost.linear(65536, 16, 4096, INT8, ceilings()).products[0]
    assert fprop.bf16_ms == pytest.approx((2 * (65536 + 16) * 4096 + 2 * 65536 * 16) / 3.0e9)
    assert fprop.ms == pytest.approx(((65536 + 16) * 4096 + 2 * 65536 * 16) / 3.0e9)


def test_one_tile_more_than_the_processors_is_a_second_wave(monkeypatch):
    monkeypatch.setattr(cost, "_choice", lambda *_: Choice("triton", (128, 256, 128, 8, 3), ""))
    gpu = ceilings(arch="sm90", processors=128)
    m, n, k = 128 * 16, 256 * 8, 4096  # 128 tiles
    fprop, _, _ = cost.linear(m, n, k, INT8, gpu).products
    ideal = 2 * m * n * k / 1200e9
    assert fprop.ms == pytest.approx(ideal + cost.LAUNCH_US / 1e3)
    more = cost.linear(m + 1, n, k, INT8, gpu).products[0].ms - cost.LAUNCH_US / 1e3
    assert more == pytest.approx(2 * ideal)


def test_a_sum_that_programs_share_fills_the_processors_that_its_tiles_leave_idle(monkeypatch):
    gpu, (m, n, k) = ceilings(arch="sm90", processors=128), (128 * 4, 256 * 8, 65536)  # 32 tiles
    for split_k, share in ((1, 1 / 4), (3, 3 / 4), (4, 1), (5, 5 / 8)):
        choice = Choice("triton", (128, 256, 128, 8, 3), "", "portable", split_k)
        monkeypatch.setattr(cost, "_choice", lambda *_, choice=choice: choice)
        got = cost.product("wgrad", (m, n, k), 1200, gpu).ms - cost.LAUNCH_US / 1e3
        assert got == pytest.approx(2 * m * n * k / 1200e9 / share)


def test_a_ramp_is_so_many_terms_of_a_programs_sum(monkeypatch):
    gpu, (m, n, k) = ceilings(arch="sm90", processors=128), (128 * 16, 256 * 8, 4096)
    for split_k in (1, 2):
        choice = Choice("triton", (128, 256, 128, 8, 3), "", "portable", split_k)
        monkeypatch.setattr(cost, "_choice", lambda *_, choice=choice: choice)
        plain = cost.product("", (m, n, k), 1200, gpu)
        ramped = cost.product("", (m, n, k), 1200, replace(gpu, ramp=512.0, bf16_ramp=1024.0))
        launch = cost.LAUNCH_US / 1e3
        assert ramped.ms - launch == pytest.approx((plain.ms - launch) * (1 + 512 * split_k / k))
        assert ramped.bf16_ms - launch == pytest.approx((plain.bf16_ms - launch) * 1.25)


def test_bf16_has_the_part_of_our_waves_that_it_is_given(monkeypatch):
    monkeypatch.setattr(cost, "_choice", lambda *_: Choice("triton", (128, 256, 128, 8, 3), ""))
    gpu, shape = ceilings(arch="sm90", processors=128, launch_us=0.0), (128 * 8, 256 * 4, 65536)  # a quarter full
    full = 2e-9 * shape[0] * shape[1] * shape[2] / 798
    for fill, losses in ((0.0, 1.0), (0.5, 2.0), (1.0, 4.0)):
        got = cost.product("", shape, 1200, replace(gpu, bf16_fill=fill))
        assert got.bf16_ms == pytest.approx(full * losses)
        assert got.ms == cost.product("", shape, 1200, gpu).ms


def test_quantization_takes_its_share_of_the_bandwidth_and_each_kernel_its_launch():
    gpu = ceilings(arch="sm90", processors=132)
    plain, slow = (cost.linear(4096, 4096, 4096, INT8, g).passes for g in (gpu, replace(gpu, quantize_share=0.5)))
    for before, after, kernels in zip(plain, slow, (1, 1, 4), strict=True):
        launches = kernels * cost.LAUNCH_US / 1e3
        assert after.ms - launches == pytest.approx(2 * (before.ms - launches))
        dear = next(
            p for p in cost.linear(4096, 4096, 4096, INT8, replace(gpu, launch_us=7.0)).passes if p.name == after.name
        )
        assert dear.ms - before.ms == pytest.approx(5e-3 * kernels)


def test_small_layers_pay_for_waves_and_launches():
    """The same rates on a GPU whose processors are known: a small layer takes longer, a large one hardly."""
    gpu = ceilings(arch="sm90", processors=132)
    small, large = (cost.linear(d, d, d, INT8, gpu).ms / cost.linear(d, d, d, INT8, ceilings()).ms for d in (256, 8192))
    assert small > 5 and 1 < large < 1.15


def test_the_householder_transform_costs_its_passes():
    """bhq beside psq: dY is read three times and dX leaves the product in float32; auto compares; tiles need no inverse."""

    def bytes_of(name):
        prediction = cost.linear(64, 32, 16, Recipe.parse(name), ceilings())
        return {p.name: p.bytes_per_element for p in prediction.passes}

    psq = bytes_of("psq4")
    assert psq["dY"] == 6 and "dX" not in psq
    assert bytes_of("bhq4") == psq | {"dY": 8, "dX": 8}
    assert bytes_of("auto4") == psq | {"dY": 10, "dX": 8}
    assert bytes_of("bhq4-tile") == psq | {"dY": 8}
    passes = {p.name: p.elements for p in cost.linear(64, 32, 16, Recipe.bhq(4), ceilings()).passes}
    assert passes == {"X": 64 * 16, "W": 32 * 16, "dY": 64 * 32, "dX": 64 * 16}


# ---- what is not predicted


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe.exact(), "nothing is quantized"),
        (Recipe.qat(8), "float32"),
    ],
)
def test_a_recipe_that_the_model_does_not_cover_is_refused(recipe, says):
    with pytest.raises(NotModelled, match=says):
        cost.linear(4096, 4096, 4096, recipe, ceilings())


def test_fp8_codes_take_the_rate_of_fp8_and_need_one():
    gpu = Ceilings(798, 1, 1200, 3.0, "measured")
    fp8 = cost.linear(8192, 8192, 8192, Recipe.fp8(), gpu)
    assert fp8.codes == "fp8" and fp8.ratio == ratio(8192, 8192, 8192)
    with pytest.raises(NotModelled, match="fp8"):
        cost.linear(8192, 8192, 8192, Recipe.fp8(), ceilings())


@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 0, 8), (8, 8, 0)])
def test_an_empty_product_is_no_prediction(shape):
    with pytest.raises(NotModelled, match="=0"):
        cost.linear(*shape, INT8, ceilings())


def test_without_a_gpu_or_with_an_unknown_one_there_is_no_prediction():
    with pytest.raises(NotModelled, match="no GPU: on cpu"):
        cost.ceilings(torch.device("cpu"))
    with pytest.raises(NotModelled, match="Quadro RTX 8000"):
        cost.named("Quadro RTX 8000", "sm75", 72)


@pytest.mark.parametrize(
    ("recipe", "arch", "runs"),
    [(INT8, "sm75", False), (INT8, "sm80", True), (INT8, "sm103", False), (Recipe.fp8(), "sm80", False),
     (Recipe.fp8(), "sm90", True), (Recipe.fp8(), "sm103", True), (INT8, "gfx942", True)],
)  # fmt: skip
def test_only_what_runs_on_a_kernel_is_predicted(recipe, arch, runs):
    gpu = Ceilings(798, 1200, 1200, 3.0, "measured", arch=arch, processors=100)
    if runs:
        assert cost.linear(8192, 8192, 8192, recipe, gpu).ratio > 1
    else:
        with pytest.raises(NotModelled, match="plain torch"):
            cost.linear(8192, 8192, 8192, recipe, gpu)


# ---- ceilings


@pytest.mark.parametrize(
    ("gpu", "arch", "bf16", "int8"),
    [
        ("NVIDIA A10", "sm86", 125, 250),
        ("NVIDIA A30", "sm80", 165, 330),
        ("NVIDIA A40", "sm86", 149.7, 299.3),
        ("NVIDIA A100-SXM4-40GB", "sm80", 312, 624),
        ("NVIDIA A100-PCIE-40GB", "sm80", 312, 624),
        ("NVIDIA A100-SXM4-80GB", "sm80", 312, 624),
        ("NVIDIA A100 80GB PCIe", "sm80", 312, 624),
        ("NVIDIA GeForce RTX 3090", "sm86", 71, 284),
        ("NVIDIA L4", "sm89", 121, 242),
        ("NVIDIA L40", "sm89", 181, 362),
        ("NVIDIA L40S", "sm89", 362, 733),
        ("NVIDIA GeForce RTX 4090", "sm89", 165.2, 660.6),
        ("NVIDIA GeForce RTX 5090", "sm120", 209.5, 838),
        ("NVIDIA H100 PCIe", "sm90", 756, 1513),
        ("NVIDIA H100 NVL", "sm90", 835, 1670),
        ("NVIDIA H100 80GB HBM3", "sm90", 989, 1979),
        ("NVIDIA H200", "sm90", 989, 1979),
        ("NVIDIA B200", "sm100", 2250, 4500),
        ("NVIDIA B300 SXM6 AC", "sm103", 2250, 150),
        ("AMD Instinct MI210", "gfx90a", 181, 181),
        ("AMD Instinct MI250X", "gfx90a", 191.5, 191.5),
        ("AMD Instinct MI300X", "gfx942", 1307.4, 2614.9),
        ("AMD Instinct MI325X", "gfx942", 1307.4, 2614.9),
    ],
)
def test_a_gpu_is_found_by_its_name_and_reaches_a_share_of_its_peaks(gpu, arch, bf16, int8):
    got = cost.from_datasheet(gpu, arch, 100)
    assert got.source == "datasheet" and got.gpu == gpu
    assert 0.3 * bf16 < got.bf16_tflops < bf16 and 0.3 * int8 < got.int8_tops < int8


@pytest.mark.parametrize(
    "gpu",
    ["NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GH200 480GB",
     "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H200 NVL", "NVIDIA A100X", "NVIDIA B100"],
)  # fmt: skip
def test_a_name_that_resembles_another_is_unknown(gpu):
    with pytest.raises(NotModelled, match="no datasheet figures"):
        cost.from_datasheet(gpu, "sm90", 100)


def test_the_expectations_of_the_design_for_other_gpus():
    """About 1.6× on an A100, 3× on an RTX 4090; INT8 next to absent on a B300."""
    cube = (8192, 8192, 8192, INT8)
    assert cost.linear(*cube, cost.from_datasheet(*A100)).ratio == pytest.approx(1.6, abs=0.05)
    rtx = cost.from_datasheet("NVIDIA GeForce RTX 4090", "sm89", 128)
    assert cost.linear(*cube, rtx).ratio == pytest.approx(3.0, abs=0.1)
    b300 = cost.from_datasheet("NVIDIA B300 SXM6 AC", "sm103", 0)
    assert cost.linear(*cube, b300).ratio < 0.2 < 1 < cost.linear(*cube[:3], Recipe.fp8(), b300).ratio


def _entry(**fields):
    return {"gpu": H100[0], "bf16_tflops": 800.5, "int8_tops": 1000.0, "fp8_tflops": 1200.0, "tb_s": 3,
            "versions": {"torch": "2.11.0"}, "date": "2026-01-02T03:04:05+00:00", "file": "x.json", **fields}  # fmt: skip


@pytest.fixture
def measured(tmp_path, monkeypatch):
    path = tmp_path / "ceilings.json"
    monkeypatch.setattr(cost, "MEASURED", path)
    cost.named.cache_clear()
    yield lambda entries: path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    cost.named.cache_clear()


def test_measured_ceilings_come_before_the_datasheet_the_newest_first(measured):
    measured([_entry(), _entry(int8_tops=1111.0, date="2026-02-01T00:00:00+00:00"), _entry(date="2025-01-01")])
    got = cost.named(*H100)
    assert (got.source, got.int8_tops, got.tb_s, got.processors) == ("measured", 1111.0, 3, 132)
    assert cost.named(*A100).source == "datasheet"


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ("[", "not JSON"),
        ({}, "a list"),
        ([_entry(), {"gpu": "x"}], "entry 1: its fields must be gpu, "),
        (["x"], "entry 0: .*got str"),
        ([_entry(bf16_tflops=0)], "bf16_tflops must be a positive number, got 0"),
        ([_entry(tb_s="3")], "tb_s must be a positive number, got '3'"),
        ([_entry(int8_tops=None)], "int8_tops .*None"),
        ([_entry(fp8_tflops=float("nan"))], "fp8_tflops .*nan"),
        ([_entry(gpu="")], "gpu must be a non-empty str"),
        ([_entry(versions="2.11")], "versions must be a non-empty dict"),
        ([_entry(fitted={"launch": 1.0})], "fitted may have launch_us, .*got .'launch'"),
        ([_entry(fitted={"bf16_fill": 1.5})], "fitted: bf16_fill must be a number from 0.0 to 1.0, got 1.5"),
        ([_entry(fitted={"ramp": "1"})], "fitted: ramp must be a number .*got '1'"),
    ],
)
def test_a_file_of_ceilings_that_is_no_such_list_is_an_error_with_its_place(entries, says, measured):
    measured(entries)
    with pytest.raises(ValueError, match=rf"ceilings\.json: {says}" if says.startswith(("not", "entry")) else says):
        cost.named(*H100)


def test_the_file_that_ships_is_valid_and_names_where_each_entry_was_measured():
    for gpu, entry in cost.measured(cost.MEASURED).items():
        assert gpu and entry["file"].startswith("bench/results/")


@pytest.mark.parametrize("field", ["bf16_tflops", "int8_tops", "fp8_tflops", "tb_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "1", True])
def test_ceilings_are_positive_numbers(field, value):
    with pytest.raises(ValueError, match=field):
        Ceilings(**{"bf16_tflops": 1, "int8_tops": 1, "fp8_tflops": 1, "tb_s": 1, "source": "measured", field: value})


def test_ceilings_say_where_they_are_from():
    with pytest.raises(ValueError, match=r"source.*'guess'"):
        Ceilings(1, 1, None, 1, "guess")
    assert "(datasheet)" in str(cost.from_datasheet(*A100)) and A100[0] in str(cost.from_datasheet(*A100))


def test_importing_the_model_imports_neither_torch_nor_triton():
    code = "import sys, fqt.cost; sys.exit(any(m in sys.modules for m in ('torch', 'triton', 'fqt_kernels')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---- tuned

GPU = dict(device="cuda", arch="sm90", processors=132, triton="3.6.0")


def tuned_table(m, n, k, us, bf16_us=400, recipe=INT8):
    """A table that has every operator of the layer, at us[name] microseconds."""
    entries = []
    for name, problem in tuned_cost.operators(m, n, k, recipe, "bfloat16", **GPU).items():
        product = problem.op == "scaled_mm"
        timing = Timing(
            "portable" if product else "tile", (128, 128, 128, 8, 3) if product else (64, 128, 8), 1, us[name] * 1000
        )
        bf16_ns = bf16_us * 1000 if product else 0
        entries.append(Entry(tuned.key(problem), (timing,), bf16_ns, (problem.m, problem.n, problem.k)))
    return Table(entries)


@pytest.mark.parametrize("name", ["int8", "fp8", "ptq8", "psq4"])
def test_the_operators_of_a_layer_are_those_that_its_training_asks_for(name):
    recipe = Recipe.parse(name)
    ours = tuned_cost.operators(512, 384, 256, recipe, "bfloat16", **GPU).values()
    met = collect.of_layers([Layer("layer", 512, 384, 256)], collect.Target("sm90", 132), [name])
    assert {tuned.key(problem) for problem in ours} == {tuned.key(problem) for problem in met}


US = {"fprop": 210, "dgrad": 220, "wgrad": 230, "X": 31, "W": 17, "dY": 43}


def test_tuned_times_add_up_and_scale_with_the_work():
    table = tuned_table(4096, 3072, 2048, US)
    exact = tuned_cost.tuned_linear(4096, 3072, 2048, INT8, table, **GPU)
    assert exact.ms == pytest.approx(sum(US.values()) / 1e3) and exact.bf16_ms == pytest.approx(1.2)
    assert exact.source == "tuned" and str(exact) == f"{1200 / sum(US.values()):.2f}× (tuned)"
    fewer = tuned_cost.tuned_linear(3840, 3072, 2048, INT8, table, **GPU)  # of the same bucket as 4096
    without_w = sum(US.values()) - US["W"]
    assert fewer.ms == pytest.approx((without_w * 3840 / 4096 + US["W"]) / 1e3)
    assert [p.elements for p in fewer.passes] == [3840 * 2048, 3072 * 2048, 3840 * 3072]


@pytest.mark.parametrize("name", US)
def test_a_layer_with_an_operator_that_was_not_tuned_has_no_tuned_prediction(name):
    table = tuned_table(4096, 3072, 2048, US)
    missing = tuned.key(tuned_cost.operators(4096, 3072, 2048, INT8, "bfloat16", **GPU)[name])
    with pytest.raises(NotModelled, match=rf"{name}( in bfloat16)? was not tuned"):
        tuned_cost.tuned_linear(4096, 3072, 2048, INT8, Table(e for e in table if e.key != missing), **GPU)


def test_tuning_does_not_cover_what_runs_without_its_kernels():
    for name in ("exact", "qat8", "bhq4"):
        with pytest.raises(NotModelled):
            tuned_cost.tuned_linear(64, 64, 64, Recipe.parse(name), Table(), **GPU)
