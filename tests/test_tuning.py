"""`fqt.tuning`: which table a GPU has, and tuning inside a step, within its budget and only where it was asked for."""

import json
import subprocess
import sys
import threading
import types
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import fqt
from fqt import conv_problems, store, tuned, tuning
from fqt.conv import Geometry
from fqt.dispatch import Problem
from fqt.store import Machine
from fqt.tuned import EMPTY, Entry, Timing

H100 = Machine("NVIDIA H100 80GB HBM3", "sm90", 132, "580.1", "3.6.0", "2.11.0+cu130")
GPU = torch.device("cuda", 0)


def problem(m=4096, n=4096, k=4096) -> Problem:
    return Problem("scaled_mm", m, n, k, device="cuda", arch="sm90", processors=132, triton="3.6.0")


def entry(m=4096, n=4096, k=4096, ns=1000) -> Entry:
    return Entry(tuned.key(problem(m, n, k)), (Timing("portable", (128, 128, 128, 8, 3), 1, ns),), 0, (m, n, k))


@pytest.fixture(autouse=True)
def _gpus(monkeypatch, tmp_path):
    """Two H100s that are not there, with a cache directory and a folder of shipped tables of the test's own."""
    monkeypatch.setenv("FQT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(store, "_counts", type(store._counts)())
    monkeypatch.setattr(store, "_said", set())
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: H100))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tuning.reload()
    yield
    tuning.disable()
    tuning.reload()


@pytest.fixture
def tuner(monkeypatch):
    """A tuner that is no tuner: `answer` is what tune_one returns or raises, `calls` are the problems it was asked for."""
    fake = types.SimpleNamespace(answer=lambda p: entry(p.m, p.n, p.k, ns=7), calls=[])

    def tune_one(p, device):
        fake.calls.append(p)
        return fake.answer(p)

    module = types.ModuleType("fqt.tuner")
    module.tune_one = tune_one
    monkeypatch.setitem(sys.modules, "fqt.tuner", module)
    monkeypatch.setattr(fqt, "tuner", module, raising=False)
    return fake


def ship(name: str, machine: Machine, *entries: Entry) -> None:
    store.SHIPPED.mkdir(exist_ok=True)
    assert store.save(machine, entries, file=store.SHIPPED / name)


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught]


def test_only_gpus_have_a_table_and_it_is_read_once(monkeypatch):
    for device in ("cpu", "meta", "mps"):
        assert tuning.table(torch.device(device)) is EMPTY
    assert store.counts() == {}
    store.save(H100, [entry()])
    first = tuning.table(GPU)
    assert set(first) == {entry()} and first.digest == tuning.table(torch.device("cuda")).digest
    assert tuning.table(torch.device("cuda", 1)) is first  # the same machine: one table for both
    monkeypatch.setattr(store, "load", lambda machine: pytest.fail("read again"))
    assert tuning.table(GPU) is first and tuning.counts()["hit"] == 1


def test_reload_reads_what_was_saved_since():
    assert len(tuning.table(GPU)) == 0
    store.save(H100, [entry()])
    assert len(tuning.table(GPU)) == 0
    tuning.reload()
    assert set(tuning.table(GPU)) == {entry()}


def test_the_user_s_entries_win_over_shipped_ones_which_need_the_same_gpu_but_not_the_same_versions():
    old, new = replace(H100, triton="3.5.0", driver="1", torch="2.9"), replace(H100, driver="1")
    ship("a.json", new, entry(ns=5), entry(64, ns=5))
    ship("b.json", old, entry(ns=6), entry(64, ns=6), entry(128, ns=6))
    ship("c.json", replace(H100, gpu="NVIDIA H200"), entry(256))
    ship("d.json", replace(H100, processors=114), entry(256))
    store.save(H100, [entry(ns=1)])
    found = {e.exact[0]: (e.ranking[0].ns, e.origin) for e in tuning.table(GPU)}
    assert found == {4096: (1, ""), 64: (5, "shipped"), 128: (6, "shipped")}


def test_shipped_entries_outlive_a_change_of_the_kernels_but_not_of_their_configurations(monkeypatch):
    bad = tuned.to_json(entry(64))
    bad["ranking"][0]["config"] = [1, 2, 3]
    items = [{"source": "0" * 16} | tuned.to_json(entry()), {"source": "0" * 16} | bad]
    store.SHIPPED.mkdir()
    (store.SHIPPED / "a.json").write_text(json.dumps({"schema": 1, "machine": asdict(H100), "entries": items}))
    (store.SHIPPED / "broken.json").write_text("{")
    table, texts = said(lambda: tuning.table(GPU))
    assert [e.exact[0] for e in table] == [4096] and len(texts) == 2
    assert store.counts()["refused: a configuration that the code does not have"] == 1


def test_every_table_in_the_package_is_of_its_form_and_of_this_code():
    folder = Path(store.__file__).with_name("tables")
    for file in folder.glob("*.json"):
        content = store._read(file, trusted=True)
        table, refused = tuned.from_json([store._without_source(item) for item in content.entries])
        assert refused == {} and len(table) == len(content.entries) > 0, file
    assert (folder / "README.md").exists()


def test_importing_tuning_needs_neither_torch_nor_triton():
    code = "import sys, fqt; fqt.tuning.enabled(), fqt.tuning.counts(); print({'torch', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_nothing_is_tuned_unless_it_was_asked_for(tuner):
    assert not tuning.enabled() and tuning.tune_now(problem(), GPU) is None
    with tuning.enable():
        assert tuning.enabled() and tuning.tune_now(problem(), torch.device("cpu")) is None
    assert not tuning.enabled() and tuning.tune_now(problem(), GPU) is None
    tuning.enable()
    tuning.disable()
    assert not tuning.enabled() and tuner.calls == []


def test_leaving_the_context_restores_what_was_before_it(tuner):
    tuning.enable(5)
    with pytest.raises(KeyError), tuning.enable(7):
        raise KeyError
    assert tuning.enabled() and tuning._session.budget_s == 5


@pytest.mark.parametrize("budget", [0, -1, True, "60", None, float("nan")])
def test_a_budget_is_a_positive_number(budget):
    with pytest.raises(ValueError, match=r"budget_s must be a positive number of seconds, got"):
        tuning.enable(budget)


def test_what_is_found_is_used_at_once_and_stored(tuner):
    before = tuning.table(GPU)
    with tuning.enable():
        found = tuning.tune_now(problem(), GPU)
    after = tuning.table(GPU)
    assert found == entry(ns=7) and after.exact(problem()) is found and len(before) == 0 and after is not before
    assert tuning.table(torch.device("cuda", 1)) is after
    tuning.reload()
    assert set(tuning.table(GPU)) == {found} and tuning.counts()["tuned"] == 1


def test_where_the_store_cannot_be_written_the_process_still_uses_what_it_found(tuner, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FQT_CACHE_DIR", str(tmp_path / "file"))
    with tuning.enable():
        found, texts = said(lambda: tuning.tune_now(problem(), GPU))
    assert tuning.table(GPU).exact(problem()) is found is not None
    assert any("not saved" in text for text in texts)


@pytest.mark.parametrize("failure", ["raises", "invents a kernel"])
def test_a_failure_is_said_once_with_problem_and_reason_and_not_tried_again(failure, tuner):
    def broken(p):
        if failure == "raises":
            raise RuntimeError("out of shared memory")
        return entry()._replace(ranking=(Timing("flash", (), 1, 1),))

    tuner.answer = broken
    with tuning.enable():
        for _ in range(3):
            result, texts = said(lambda: tuning.tune_now(problem(), GPU))
            assert result is None
            assert len(texts) == (len(tuner.calls) == 1 and _ == 0)
            if texts:
                reason = {"raises": "out of shared", "invents a kernel": "unknown kernel"}
                assert reason[failure] in texts[0] and "m=4096" in texts[0]
        assert len(tuner.calls) == 1 and len(tuning.table(GPU)) == 0 and tuning.counts()["tuning failed"] == 1
        tuner.answer = lambda p: entry(p.m)
        assert tuning.tune_now(problem(64), GPU) == entry(64)  # other problems are tuned all the same
        tuning.reload()
        assert tuning.tune_now(problem(), GPU) == entry()


def test_an_interrupt_is_no_failure(tuner):
    def interrupted(p):
        raise KeyboardInterrupt

    tuner.answer = interrupted
    with tuning.enable():
        with pytest.raises(KeyboardInterrupt):
            tuning.tune_now(problem(), GPU)
        tuner.answer = lambda p: entry()
        assert tuning.tune_now(problem(), GPU) == entry()


def test_a_spent_budget_is_said_once_and_ends_tuning(tuner, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])

    def slow(p):
        clock[0] += 4.0
        return entry(p.m)

    tuner.answer = slow
    tuning.enable(budget_s=10)
    _, texts = said(lambda: [tuning.tune_now(problem(m), GPU) for m in (16, 32, 48, 64, 80)])
    assert [p.m for p in tuner.calls] == [16, 32, 48] and not tuning.enabled()  # the third began within the budget
    assert [text for text in texts if "10 s are spent" in text] == texts and len(texts) == 1
    tuning.enable(budget_s=10)  # a budget of its own
    assert tuning.tune_now(problem(64), GPU) == entry(64)


def test_nothing_is_tuned_within_a_tuning(tuner):
    inner = []

    def nested(p):
        inner.append(tuning.tune_now(problem(64), GPU))
        other = threading.Thread(target=lambda: inner.append(tuning.tune_now(problem(64), GPU)))
        other.start()
        other.join(10)  # another thread does not wait: the tuner may be waiting for it
        return entry(p.m)

    tuner.answer = nested
    with tuning.enable():
        assert tuning.tune_now(problem(), GPU) == entry() and inner == [None, None]


def convolution(kernel=1, channels=64, images=32) -> Problem:
    g = Geometry.of((8, 8), (kernel, kernel), padding=((kernel // 2,) * 2,) * 2)
    stored = channels if channels < 16 else conv_problems.padded(channels)
    call = conv_problems.product(g, images, 128, channels, stored, False)
    return replace(problem(*call.sizes), op=call.op, **call.more)


def answer(p: Problem) -> Entry:
    way = Timing("portable", (128, 128, 128, 8, 3), 1, 7) if p.op == "scaled_mm" else Timing("pointwise", (), 1, 7)
    return Entry(tuned.key(p), (way,), 0, (p.m, p.n, p.k))


@pytest.mark.parametrize(("of", "k"), [(convolution(), 64), (convolution(3, 3), 32)])  # 27 terms, padded
def test_a_convolution_is_timed_after_the_product_of_matrices_that_it_may_be(of, k, tuner):
    tuner.answer = answer
    with tuning.enable():
        assert tuning.tune_now(of, GPU) == answer(of)
        assert [(p.op, p.m, p.n, p.k) for p in tuner.calls] == [("scaled_mm", 2048, 128, k), (of.op, *tuned_sizes(of))]
        assert tuning.table(GPU).exact(problem(2048, 128, k)) is not None
        tuning.tune_now(of, GPU)
        assert [p.op for p in tuner.calls[2:]] == [of.op]  # the other is known


def test_a_product_that_is_posed_as_not_plain_is_measured_as_one_that_is(tuner):
    tuner.answer = answer
    with tuning.enable():
        tuning.tune_now(replace(convolution(), plain=False), GPU)
    assert [p.op for p in tuner.calls] == ["scaled_mm", "conv"]


def tuned_sizes(p: Problem) -> tuple[int, int, int]:
    return p.m, p.n, p.k


def test_a_convolution_that_is_no_product_of_matrices_is_tuned_alone(tuner):
    tuner.answer = answer
    with tuning.enable():
        tuning.tune_now(convolution(3), GPU)
    assert [p.op for p in tuner.calls] == ["conv"]


def test_where_the_product_of_matrices_fails_the_convolution_is_tuned_all_the_same(tuner):
    tuner.answer = lambda p: answer(p) if p.op == "conv" else 1 / 0
    with tuning.enable():
        found, texts = said(lambda: [tuning.tune_now(convolution(), GPU) for _ in range(2)])
    assert found == [answer(convolution())] * 2 and len(texts) == 1
    assert [p.op for p in tuner.calls] == ["scaled_mm", "conv", "conv"]  # what failed is not tried again


def test_several_ranks_do_not_tune_apart(tuner, monkeypatch):
    tuning.enable()
    monkeypatch.setattr(tuning, "_world_size", lambda: 4)
    with pytest.raises(RuntimeError, match="4 ranks would tune apart and disagree: run `fqt tune`"):
        tuning.enable()
    assert tuning.enabled()
    _, texts = said(lambda: tuning.tune_now(problem(), GPU))  # the process group came after enable()
    assert len(texts) == 1 and "4 ranks" in texts[0] and not tuning.enabled() and tuner.calls == []


def test_a_process_alone_agrees_with_itself():
    assert tuning.agreement() == {0: EMPTY.digest}
