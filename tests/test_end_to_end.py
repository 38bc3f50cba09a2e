"""Laws of the end-to-end benchmark: one candidate at a time, each checked; what is not measured is named and kept."""

import copy
import json
import re
import types
import weakref
from pathlib import Path

import pytest
import torch
from bench_fakes import FakeTimer
from torch import nn

import fqt_kernels
from fqt import cli, suites
from fqt_bench import cuda, end_to_end, parameters, peers, providers, resnet50, train
from fqt_bench import end_to_end_networks as networks
from fqt_bench import end_to_end_visit as visiting
from fqt_bench.end_to_end_tables import draw, tables
from fqt_bench.harness import Budget, Wrong

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
RUNS_HERE = ["exact", "int8", "psq8", "bhq5"]
ALL = ["exact", "exact compiled", "int8", "psq8", "torchao", "bhq5", "int8 compiled"]


@pytest.fixture(scope="module")
def work():
    return networks.llama_stack(1, 32, CPU, quick=True)


@pytest.fixture
def cpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def result(tmp_path, cpu_alone, monkeypatch):
    """main(*more): the exit status and the result of a small stack, checked for fewer steps."""
    monkeypatch.setattr(visiting, "CHECKED", 4)

    def main(*more):
        out = tmp_path / "end-to-end.json"
        line = ["--quick", "--networks", "llama", "--layers", "1", "--tokens", "32", "--out", str(out), *more]
        return end_to_end.main(line), json.loads(out.read_text())

    return main


def fake(ms=1.0, losses=(2.0, 1.0), timer=None, seconds=0.0, seen=None):
    """In place of `visit`: every candidate takes so long; `seen` gets their tags."""

    def visit(work, way, device, steps, full):
        if seen is not None:
            seen.append(way.fields["tag"])
        if timer is not None:
            timer.clock += seconds
        return {"remark": "fine", "seconds": seconds, "losses": list(losses), "memory": None, "ms": ms,
                "samples_ms": [ms] * steps, "host_ms": 0.1}  # fmt: skip

    return visit


def measured(work, limit_s=1e9, rounds=2, timer=None, saved=None):
    """The candidates by tag."""
    found, timer = [], timer or FakeTimer()
    save = (lambda: None) if saved is None else (lambda: saved.append(copy.deepcopy(found)))
    end_to_end.measure(work, CPU, Budget(limit_s, timer), rounds, 2, save, found)
    return {c["tag"]: c for c in found}


def of_a_gpu(work, candidates):
    """A result."""
    environment = {"gpu": "GPU", "date": "2026-01-01", "torch": "", "triton": "", "commit": "", "device": "cuda"}
    network = {**work._asdict(), "note": "", "candidates": candidates}
    return {"environment": environment, "method": "", "networks": [network]}


def use(monkeypatch, visit):
    """In place of the real one; then there is nothing to free or to draw."""
    monkeypatch.setattr(end_to_end, "visit", visit)
    monkeypatch.setattr(end_to_end, "free", lambda device, held: None)
    monkeypatch.setattr(end_to_end, "draw", lambda result, path: None)


def raises_in(monkeypatch, tag, error, only=lambda seen: True):
    seen = []
    plain = fake(seen=seen)

    def visit(work, way, *more):
        found = plain(work, way, *more)
        if way.fields["tag"] == tag and only(seen):
            raise error
        return found

    use(monkeypatch, visit)
    return seen


# ---- the whole of it


def test_every_candidate_has_a_row_or_a_reason(result, tmp_path, capsys):
    status, found = result()
    (network,) = found["networks"]
    assert status == 0 and found["kind"] == "end to end" and found["spent_s"] > 0
    by_tag = {c["tag"]: c for c in network["candidates"]}
    assert list(by_tag) == ALL and [t for t, c in by_tag.items() if c["status"] == "ok"] == RUNS_HERE
    for tag in RUNS_HERE:
        c = by_tag[tag]
        assert [r["round"] for r in c["rounds"]] == [0, 1] and c["ms"]["n"] == 2 * end_to_end.QUICK_STEPS
        assert c["rounds"][0]["losses"] == c["rounds"][1]["losses"], "each round begins with the same weights and draws"
        assert c["ratio"]["exact"]["low"] <= c["ratio"]["exact"]["high"] and "exact compiled" not in c["ratio"]
        assert c["items_s"] == pytest.approx(32e3 / c["ms"]["median"]) and c["peak"] is None
    assert len({c["rounds"][0]["losses"][1] for c in by_tag.values() if c["rounds"]}) == 4, "each computes otherwise"
    assert by_tag["exact compiled"]["remark"] == "needs a GPU" and by_tag["torchao"]["status"] == "not run"
    said = capsys.readouterr().out
    assert all(c["name"] in said for c in network["candidates"]) and "say nothing about a GPU" in said
    assert (tmp_path / "end-to-end.png").read_bytes().startswith(b"\x89PNG")
    assert end_to_end.main(["--report", str(tmp_path / "end-to-end.json")]) == 0 and capsys.readouterr().out == said


def test_without_a_gpu_only_toy_sizes_are_measured(tmp_path, cpu_alone, capsys):
    for arguments, said in ((["--layers", "1"], "without --quick"), (["--quick", "--profile"], "needs a GPU")):
        with pytest.raises(SystemExit) as e:
            end_to_end.main([*arguments, "--out", str(tmp_path / "f.json")])
        assert e.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- rounds


def test_the_second_round_is_in_the_opposite_order(monkeypatch, work):
    seen = []
    use(monkeypatch, fake(seen=seen))
    measured(work, rounds=3)
    assert seen == RUNS_HERE + RUNS_HERE[::-1] + RUNS_HERE


def test_one_model_is_alive_at_a_time(monkeypatch, work):
    """Those before it are gone when a candidate is built, also after an error."""
    models, alive, build = [], [], work.network.build

    def watched():
        alive.append(sum(ref() is not None for ref in models))
        models.append(weakref.ref(model := build()))
        model.cycle = [model]  # as hooks and what was compiled make
        return model

    monkeypatch.setattr(visiting, "CHECKED", 2)
    plain = networks.ways

    def broken(work, device):
        exact, *_, bhq5, last = plain(work, device)
        return [exact, bhq5._replace(allowed=0.0), bhq5, last]

    monkeypatch.setattr(end_to_end, "ways", broken)
    measured(work._replace(network=work.network._replace(build=watched)))
    assert len(models) == 5 and alive == [0] * 5


def test_medians_rates_and_ratios_are_those_of_the_rounds(work):
    def record(tag, *rounds):
        each = [
            {"round": n, "ms": ms, "samples_ms": [ms, ms], "memory": {"peak": 10 * ms, "saved": ms}} for n, ms in rounds
        ]
        return {"tag": tag, "status": "ok", "rounds": each}

    found = [record("exact", (0, 4.0), (1, 6.0)), record("int8", (0, 2.0), (1, 2.0)), record("psq8", (1, 3.0))]
    end_to_end.add_figures(work, found)
    exact, int8, psq8 = found
    assert exact["ms"] == {"median": 5.0, "low": 4.0, "high": 6.0, "n": 4}
    assert int8["ratio"] == {"exact": {"value": 2.5, "low": 2.0, "high": 3.0}}
    assert psq8["ratio"] == {"exact": {"value": 2.0, "low": 2.0, "high": 2.0}}, "of the rounds that both have"
    assert int8["items_s"] == work.items / 2e-3 and int8["tflops"] == pytest.approx(work.flops / 2e-3 * 1e-12)
    assert (exact["peak"], exact["saved"]) == (60.0, 6.0)
    int8["status"] = "wrong"
    end_to_end.add_figures(work, found)
    assert "ms" not in int8 and "ratio" not in int8


# ---- the check


def frozen(model):
    for p in list(model.parameters())[:-1]:
        p.register_hook(torch.zeros_like)
    return model


def noisy(model):
    """A tenth of the gradient and noise of its size: it learns, and ends where exact does."""
    for p in model.parameters():
        p.register_hook(lambda g: 0.1 * g + g.norm() / g.numel() ** 0.5 * torch.randn_like(g))
    return model


@pytest.mark.parametrize("convert", [frozen, noisy])
def test_a_candidate_that_does_not_learn_as_exact_does_is_wrong(monkeypatch, work, convert):
    plain = networks.ways

    def one_is_wrong(work, device):
        exact, _, int8, *_ = plain(work, device)
        return [exact, int8._replace(convert=convert), int8]

    monkeypatch.setattr(end_to_end, "ways", one_is_wrong)
    found = []
    end_to_end.measure(work, CPU, Budget(1e9, FakeTimer()), 1, 1, lambda: None, found)
    exact, wrong, int8 = found
    assert (exact["status"], wrong["status"], int8["status"]) == ("ok", "wrong", "ok")
    assert "allowed 5%" in wrong["remark"] and "ms" not in wrong and "ms" in int8
    assert f"- {wrong['name']}: wrong: {wrong['remark']}" in tables(of_a_gpu(work, found))


def test_losses_are_compared_at_every_step():
    full = [4.0, 2.0, 1.0, 0.0]
    assert visiting.judged(full, None, 0.05) == "loss 4.000 to 0.000"
    assert "at most 4.9% off" in visiting.judged([4.0, 2.195, 1.1, 0.0], full, 0.05)
    for losses, said in (([4.0, 2.3, 1.0, 0.0], "after 1 steps"), ([4.0, 2.0, 1.0, 0.3], "after 3 steps"),
                         ([4.0, float("nan"), 1.0, 0.0], "nan")):  # fmt: skip
        with pytest.raises(Wrong, match=said):
            visiting.judged(losses, full, 0.05)
    with pytest.raises(Wrong, match="learns nothing"):
        visiting.judged([1.0, 1.0], None, 0.05)


# ---- what is not measured


def test_what_does_not_fit_is_recorded_and_the_others_go_on(monkeypatch, work):
    raises_in(monkeypatch, "int8", torch.OutOfMemoryError("CUDA out of memory. Tried 20 GiB\nmore"))
    found = measured(work)
    assert found["int8"]["status"] == "out of memory" and found["int8"]["remark"].endswith("20 GiB")
    assert "ms" not in found["int8"] and all("ms" in found[tag] for tag in ("exact", "psq8", "bhq5"))


def test_where_exact_does_not_fit_nothing_is_checked_hence_nothing_timed(monkeypatch, work):
    seen = raises_in(monkeypatch, "exact", torch.OutOfMemoryError("20 GiB"))
    found = measured(work)
    assert seen == ["exact"] and found["exact"]["status"] == "out of memory"
    assert found["psq8"]["status"] == "not run" and "nothing to check it against" in found["psq8"]["remark"]


def test_what_the_limit_leaves_out_is_named(monkeypatch, work):
    timer = FakeTimer()
    use(monkeypatch, fake(ms=1000.0, timer=timer, seconds=20.0))
    found = measured(work, limit_s=117.0, timer=timer)  # 16 s are needed: six visits of 20 s
    assert [len(found[tag]["rounds"]) for tag in RUNS_HERE] == [1, 1, 2, 2]
    assert "round 2: 0 s are left, 16 s are needed" in found["exact"]["remark"] and found["exact"]["status"] == "ok"
    timer.clock = 0.0
    found = measured(work, limit_s=30.0, timer=timer)
    assert found["int8"] == {
        **found["int8"],
        "status": "not run",
        "remark": "10 s are left, 16 s are needed",
        "rounds": [],
    }


def test_a_run_that_measures_nothing_has_failed(result):
    status, found = result("--limit-s", "1")
    assert status == 1 and {c["status"] for c in found["networks"][0]["candidates"]} == {"not run"}


def test_the_file_has_what_was_done_when_a_run_is_cut_off(monkeypatch, result, tmp_path):
    raises_in(monkeypatch, "psq8", KeyboardInterrupt(), only=lambda seen: len(seen) == 3)
    status, found = result()
    assert status == cli.INTERRUPTED
    assert {c["tag"] for c in found["networks"][0]["candidates"] if "ms" in c} == {"exact", "int8"}
    draw(found, tmp_path / "cut.png")
    assert (tmp_path / "cut.png").exists() and "fqt int8" in tables(found)


def test_only_errors_of_fqts_own_fail_the_run(monkeypatch, result):
    raises_in(monkeypatch, "psq8", RuntimeError("no kernel\nfor this"))
    status, found = result()
    assert status == 1
    assert [c["remark"] for c in found["networks"][0]["candidates"] if c["status"] == "error"] == [
        "RuntimeError: no kernel"
    ]
    here = {name: provider._replace(against=lambda device: "") for name, provider in providers.PROVIDERS.items()}
    monkeypatch.setattr(providers, "PROVIDERS", here)
    raises_in(monkeypatch, "torchao", RuntimeError("no kernel"))
    status, found = result()
    assert status == 0 and found["networks"][0]["candidates"][4]["status"] == "error"


def test_blocks_are_left_out_where_the_steps_would_not_end_in_time(monkeypatch, result):
    assert end_to_end.fitting(12, 0.2, 100, 25.0) == (12, "")
    assert end_to_end.fitting(12, 0.4, 100, 25.0)[0] == 6 and end_to_end.fitting(12, 40.0, 100, 25.0)[0] == 1
    use(monkeypatch, fake())
    monkeypatch.setattr(end_to_end, "exact_step_s", lambda work, device: 5.0)  # 2 rounds, 4 ways, 11 steps: 550 s
    status, found = result("--layers", "10", "--limit-s", "570")
    (network,) = found["networks"]
    assert status == 0 and (network["layers"], network["layers_asked"]) == (5, 10)
    assert network["note"].startswith("5 of 10 blocks: with all a step of exact takes 5000 ms") and network[
        "note"
    ] in tables(found)


def test_what_is_not_compiled_yet_needs_more_time_on_a_gpu():
    first, timer = {"name": "exact", "rounds": []}, FakeTimer()
    for seconds, compiling, said in ((6.0, 0.0, ""), (6.0, 45.0, "6 s are left, 50 s are needed"), (51.0, 45.0, "")):
        assert end_to_end._lacking(first, first, Budget(seconds, timer), 2, compiling) == said


# ---- as a GPU would


class FakeGpu:
    """torch.cuda of a device on which a forward keeps 100 bytes, and a step takes as many ms as there were before it."""

    def __init__(self):
        self.live, self.steps = 7, 0

    def install(self, monkeypatch):
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at, gpu.steps = gpu.steps * (gpu.steps - 1) / 2, gpu.steps + 1

            def elapsed_time(self, end):
                return end.at - self.at

        known = {"memory_allocated": lambda *device: gpu.live, "reset_peak_memory_stats": lambda device: None,
                 "max_memory_allocated": lambda device: 57, "synchronize": lambda device: None, "Event": Event,
                 "empty_cache": lambda: None}  # fmt: skip
        for name, function in known.items():
            monkeypatch.setattr(torch.cuda, name, function)
        return types.SimpleNamespace(type="cuda")


def test_times_are_between_events_and_memory_is_above_what_was_there(monkeypatch, work):
    gpu = FakeGpu()
    device = gpu.install(monkeypatch)
    monkeypatch.setattr(visiting, "CHECKED", 2)

    def convert(model):
        gpu.live += 40  # what it was built of
        return model

    def kept(model, inputs, output):
        gpu.live += 100

    plain = networks.ways(work, CPU)[0]
    hooked = plain._replace(convert=lambda model: model.register_forward_hook(kept) and convert(model))
    found = visiting.visit(work, hooked, device, 4, None)
    output = 32 * train.CLASSES * 4
    assert found["memory"] == {"before": 7, "built": 40, "peak": 50, "saved": 100 - output}
    assert found["samples_ms"] == [0.0, 1.0, 2.0, 3.0] and found["ms"] == 1.5 and found["host_ms"] > 0


@pytest.mark.parametrize("left", [visiting.HELD, visiting.HELD + 1])
def test_what_was_compiled_is_dropped_where_it_holds_memory(monkeypatch, left):
    gpu, dropped = FakeGpu(), []
    device = gpu.install(monkeypatch)
    monkeypatch.setattr(peers, "forget_compiled", lambda: dropped.append(1))
    gpu.live = 7 + left
    visiting.free(device, 7)
    assert bool(dropped) == (left > visiting.HELD)


# ---- networks


def test_every_block_is_compiled_on_its_own(monkeypatch):
    asked = []

    class Compiled(nn.Sequential):
        def forward(self, x, cos, sin):
            return self[0](x, cos, sin)

    def compiled(block):
        asked.append(type(block.attention.qkv).__module__)
        return Compiled(block)

    monkeypatch.setattr(peers, "compiled", compiled)
    work = networks.llama_stack(3, 8, CPU, quick=True)
    way = next(way for way in networks.ways(work, CPU) if way.fields["tag"] == "int8 compiled")
    model = way.convert(work.network.build())
    assert asked == ["fqt.nn"] * 3, "quantized, then compiled"
    assert all(isinstance(block, Compiled) for block in model.blocks)
    assert model(work.network.x).shape == (1, 8, train.CLASSES)


def test_operations_are_those_of_the_layers_products(work):
    linear = sum(p.numel() for p in work.network.build().parameters() if p.dim() == 2)
    attention = 6 * 32**2 * networks.SMALL.width
    assert work.flops == 6 * 32 * linear + attention
    with torch.device("meta"):
        counted, flops = networks._counted(resnet50.ResNet(), torch.empty(256, 3, 224, 224))
    each = [
        c.count * 2 * c.n * (c.edge // c.stride) ** 2 * c.o * c.c * c.kernel**2 * (3 - c.first)
        for c in suites.resnet50(256)
    ]
    assert counted == parameters.RESNET50.elements and flops == sum(each) + 6 * 256 * 2048 * 1000


def test_resnet_trains_by_a_recipe_and_torchao_has_no_convolutions(monkeypatch):
    """Of what a GPU trains at 224 pixels, fewer steps and images."""
    monkeypatch.setattr(visiting, "CHECKED", 3)
    work = networks.resnet50_images(4, CPU, quick=True)
    exact, _, int8, _, torchao, *_ = networks.ways(work, CPU)
    full = visiting.visit(work, exact, CPU, 1, None)["losses"]
    assert "at most" in visiting.visit(work, int8, CPU, 1, full)["remark"]
    assert torchao.fields["missing"] == networks.NO_CONVOLUTIONS


# ---- profiles


def test_a_profile_groups_kernels_by_their_names():
    names = {"_hopper_scaled_mm_kernel": "our products", "_conv_wgrad_mm_kernel": "our products",
             "_gradient_tile_kernel": "our quantization", "_rows_kernel": "our quantization", "Memcpy DtoD": "copies",
             "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
             "void pytorch_flash::flash_bwd_kernel<cutlass::bfloat16_t>": "attention",
             "nvjet_tst_128x256": "library products", "sm90_xmma_wgrad_implicit_gemm": "library products",
             "cudnn::bn_fw_tr_1C11_kernel_NHWC": "norms and pooling",
             "void at::native::vectorized_elementwise_kernel<4>": "elementwise and other"}  # fmt: skip
    assert {name: visiting.group(name) for name in names} == names
    many = {f"_other_{i}_kernel": {"count": 1, "us": 1.0} for i in range(20)}
    found = visiting.shares({"kernels": 22, "by_name": {**many, "_scaled_mm_kernel": {"count": 2, "us": 30.0}}})
    assert found["us"] == 50.0 and found["groups"] == pytest.approx({"our products": 0.6, "our quantization": 0.4})
    first, *rest = found["top"]
    assert (first["name"], first["share"], len(rest)) == ("_scaled_mm_kernel", 0.6, visiting.TOP - 1)


def test_our_kernels_are_told_from_others_by_name():
    """Every kernel of the package is in a group of ours, and what multiplies among the products."""
    sources = "".join(p.read_text() for p in Path(fqt_kernels.__file__).parent.glob("*.py"))
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.M)) - {"_choose_kernel"}
    groups = {name: visiting.group(name) for name in kernels}
    assert set(groups.values()) == {"our products", "our quantization"}, groups
    multiply = {name for name, found in groups.items() if found == "our products"}
    assert {"_scaled_mm_kernel", "_conv_mm_kernel", "_householder_mm_kernel"} <= multiply
    assert not multiply & {"_rows_kernel", "_transform_kernel", "_gradient_stats_kernel"}


def test_only_fqts_measured_candidates_are_profiled(monkeypatch, work):
    use(monkeypatch, fake())
    seen = []

    def launches(step):
        assert float(step()) > 0  # a loss
        seen.append(step)
        if len(seen) == 2:
            raise RuntimeError("no permission")
        return {"kernels": 1, "by_name": {"_rows_kernel": {"count": 1, "us": 2.0}}}

    monkeypatch.setattr(cuda, "launches", launches)
    found = measured(work)
    end_to_end.profile(work, CPU, Budget(100.0, FakeTimer()), list(found.values()))
    assert {tag for tag, c in found.items() if c["profile"]} == {"int8", "psq8", "bhq5"}
    assert found["psq8"]["profile"] == {"error": "RuntimeError: no permission"}
    said = tables(of_a_gpu(work, list(found.values())))
    assert "fqt int8: 1 kernels of 0.0 ms in all: our quantization 100%" in said and "no profile: RuntimeError" in said
