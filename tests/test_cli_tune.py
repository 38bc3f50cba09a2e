"""`fqt tune` and its verbs: what they print where, their exit status, and what they do to the files of tables."""

import json
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from fqt import cli, cli_tables, cli_tune, store, tuned, tuner
from fqt.collect import Target
from fqt.dispatch import Problem
from fqt.store import Machine
from fqt.tuned import Entry, Timing
from fqt.tuner import Report, Result

H100 = Machine("NVIDIA H100 80GB HBM3", "sm90", 132, "580.1", "3.6.0", "2.11.0+cu130")
L4 = replace(H100, gpu="NVIDIA L4", arch="sm89", processors=58)
PROBLEM = Problem("scaled_mm", 4096, 4096, 4096, device="cuda", arch="sm90", processors=132, triton="3.6.0")
BEST, NEXT = Timing("portable", (128, 256, 128, 8, 3), 1, 140_000), Timing("cublas", (), 1, 175_000)
DRY = ["tune", "--dry-run", "--arch", "sm90", "--processors", "132"]


def entry(size=4096) -> Entry:
    problem = replace(PROBLEM, m=size)
    return Entry(tuned.key(problem), (BEST, NEXT), 210_000, (size, 4096, 4096))


def result(**fields) -> Result:
    times = {tuner.title(BEST): BEST.ns, tuner.title(NEXT): NEXT.ns}
    return Result(PROBLEM, 3, **{"entry": entry(), "times": times, "heuristic": tuner.title(NEXT)} | fields)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache directory of the test's own, on a machine without a GPU."""
    monkeypatch.setenv("FQT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_counts", type(store._counts)())
    monkeypatch.setattr(store, "_said", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "cache"


@pytest.fixture
def gpu(monkeypatch):
    """An H100 as far as the command line looks, on which `gpu.report` is what a tuning finds."""
    gpu = SimpleNamespace(report=Report([result()]), calls=[])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: H100))
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: Target("sm90", 132)))

    def tune(problems, device, *, on_progress, **more):
        gpu.calls.append((problems, device, more))
        on_progress(replace(gpu.report, results=[]), 1, "compiling")
        on_progress(gpu.report, 1, "")
        return gpu.report

    monkeypatch.setattr(tuner, "tune", tune)
    return gpu


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def one_line(text: str) -> bool:
    return len(text.strip().splitlines()) == 1 and text.startswith("fqt: ")


def saved(machine=H100, *sizes, file=None):
    assert store.save(machine, [entry(size) for size in sizes or (4096,)], file=file)
    return store.path(machine) if file is None else file


# ---- fqt tune


def test_without_a_gpu_it_says_what_it_cannot_do_and_exits_2(capsys):
    status, out, err = run(capsys, "tune", "--suite", "cubes")
    assert status == 2 and out == "" and one_line(err) and "no GPU" in err and "--dry-run --arch" in err


def test_the_interpreter_is_nothing_to_measure(gpu, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    status, out, err = run(capsys, "tune")
    assert status == 2 and out == "" and one_line(err) and "TRITON_INTERPRET" in err and gpu.calls == []


@pytest.mark.parametrize("arguments", [["tune", "--help"], ["tune", "show", "--help"], ["tune", "--budget", "x"]])
def test_nothing_heavy_is_imported_before_a_command_runs(arguments):
    code = f"import sys; from fqt.cli import main; main({arguments}); sys.exit(any(m in sys.modules for m in "
    code += "'torch triton fqt.store fqt.tuner fqt_bench numpy'.split()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


ARCH = ["--dry-run", "--arch", "sm90", "--processors", "1"]


@pytest.mark.parametrize(
    "arguments, says",
    [(["--budget", text], "not a number of minutes, above 0") for text in ("0", "-1", "nan", "inf", "x")]
    + [
        (["--suite", "gpt-9"], "invalid choice: 'gpt-9'"),
        (["--suite"], "expected at least one argument"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["shout"], "invalid choice: 'shout'"),
        (["export"], "required: FILE"),
        (["merge"], "required: FILE"),
        (["--dry-run"], "wants both --arch and --processors"),
        (["--dry-run", "--arch", "sm90"], "wants both --arch and --processors"),
        (["--dry-run", "--arch", "hopper", "--processors", "3"], "got 'hopper'"),
        (["--dry-run", "--arch", "sm90", "--processors", "0"], "at least 1: '0'"),
        (["--arch", "sm90"], "go with --dry-run"),
        ([*ARCH, "--recipe", "int7"], "--recipe: unknown recipe 'int7'"),
        ([*ARCH, "--recipe", "exact"], "nothing to tune"),
        ([*ARCH, "--shapes", "no-such-file.json"], "--shapes no-such-file.json: No such file"),
        ([*ARCH, "--model", "no_such_module:f"], "--model no_such_module:f: ModuleNotFoundError"),
        (["clear", "--all", "--file", "x"], "exclude each other"),
        (["show", "--file", "no-such-file"], "no-such-file: no such file"),
        (["export", "x"], "name a table with --file; 0 in"),
    ],
)
def test_a_call_that_makes_no_sense_exits_2_and_prints_no_data(arguments, says, capsys):
    status, out, err = run(capsys, "tune", *arguments)
    assert status == 2 and out == "" and says in err and "Traceback" not in err
    assert one_line(err) or "error:" in err


def test_a_dry_run_lists_problems_and_candidates_without_a_gpu(capsys):
    status, out, err = run(capsys, *DRY, "--suite", "llama-8b")
    assert (status, err) == (0, "")
    assert "scaled_mm int 16384x28672x4096" in out and "quantize_gradient int bfloat16 per_row per_column" in out
    assert "hopper 128x256x128 w8 s4" in out and "cublas" in out
    assert out.splitlines()[-1].endswith("; nothing was run")


def test_a_dry_run_as_json_is_json_in_the_order_of_the_work(capsys):
    status, out, _ = run(capsys, *DRY, "--suite", "cubes", "--recipe", "int8", "fp8", "--json")
    found = json.loads(out)
    assert status == 0 and {"scaled_mm int 8192x8192x8192", "scaled_mm e4m3 8192x8192x8192"} < {
        f["problem"] for f in found
    }
    assert found[0]["problem"].endswith("16384x16384x16384") and all(f["candidates"] and not f["tuned"] for f in found)


def test_shapes_suites_and_models_add_up(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "shapes.json").write_text('[{"name": "mlp", "m": 640, "n": 320, "k": 160}]')
    (tmp_path / "made_for_cli.py").write_text(
        "import torch\ndef make():\n"
        "    return torch.nn.Sequential(torch.nn.ConvTranspose1d(4, 4, 1), torch.nn.Linear(48, 96)), torch.ones(32, 4, 48)\n"
    )
    asked = ["--shapes", "shapes.json", "--model", "made_for_cli:make", "--suite", "cubes", "--json"]
    status, out, err = run(capsys, *DRY, *asked)
    problems = {f["problem"] for f in json.loads(out)}
    assert status == 0 and {f"scaled_mm int {s}" for s in ("640x320x160", "128x96x48", "1024x1024x1024")} < problems
    assert "the model has 1 quantized layer" in err and "1 layer skipped (0): transposed convolutions" in err


def test_a_tuning_prints_its_table_on_stdout_and_its_progress_on_stderr(gpu, capsys):
    status, out, err = run(capsys, "tune", "--suite", "cubes", "--budget", "0.5", "--force", "--exhaustive")
    ((problems, device, more),) = gpu.calls
    assert status == 0 and problems and device == torch.device("cuda", 0)
    assert more == {"budget_s": 30.0, "file": None, "force": True, "exhaustive": True}
    row = next(line for line in out.splitlines() if line.startswith("scaled_mm"))
    assert row.split() == "scaled_mm int 4096x4096x4096 3 portable 128x256x128 w8 s3 140.0 1.25 1.50".split()
    assert err.splitlines() == [
        "fqt tune: compiling",
        "fqt tune: 1/1 scaled_mm int 4096x4096x4096: portable 128x256x128 w8 s3 140.0 µs (heuristic 175.0, bf16 210.0)",
    ]


def test_on_a_terminal_the_progress_is_one_line_with_the_best_so_far(gpu, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: SimpleNamespace(columns=200))
    _, _, err = run(capsys, "tune")
    assert err.startswith("\r\x1b[K[........................] 0/1 compiling\r\x1b[K[########################] 1/1")
    assert "best so far: scaled_mm int 4096x4096x4096: portable" in err and err.endswith("\r\x1b[K") and "\n" not in err


def test_results_as_json_are_all_that_is_on_stdout(gpu, capsys):
    status, out, _ = run(capsys, "tune", "--json")
    (found,) = json.loads(out)["results"]
    assert status == 0 and found["chosen"] == {"name": "portable 128x256x128 w8 s3", "ns": 140_000}
    assert found["heuristic"] == {"name": "cublas", "ns": 175_000} and found["bf16_ns"] == 210_000


@pytest.mark.parametrize(
    "report, status, says",
    [
        (Report([], known=5), 0, "0 problems tuned, 5 known already, 0 left"),
        (Report([result(wrong=1, excluded={"tile": "wrong: 3 differ"})]), 1, "excluded from .*: tile: wrong: 3 differ"),
        (Report([result()], unsaved=1), 1, "1 entries could not be saved"),
        (Report([result(entry=None, error="OutOfMemoryError: 9 GiB")]), 1, "OutOfMemoryError: 9 GiB"),
        (Report([result(entry=None, error="out of memory"), result()]), 0, "0 left, 1 failed"),
        (Report([result()], remaining=[PROBLEM], stopped="the budget is spent"), 0, "is spent: run the command again"),
        (Report([result(best_of_grid=("portable", 133_000))]), 0, r"140\.0 .* 0\.950"),
    ],
)  # fmt: skip
def test_the_exit_status_is_1_where_a_kernel_is_wrong_or_nothing_is_kept(gpu, capsys, report, status, says):
    gpu.report = report
    code, out, _ = run(capsys, "tune")
    assert code == status
    assert re.search(says, out), out


def test_ctrl_c_exits_130_with_the_summary_on_stderr(gpu, capsys):
    gpu.report = Report([result()], remaining=[PROBLEM], stopped="interrupted", interrupted=True)
    status, out, err = run(capsys, "tune")
    assert status == 130 and out == "" and "1 problems tuned" in err and "interrupted: run the command again" in err


def test_a_dry_run_on_this_gpu_says_what_is_tuned_already(gpu, capsys):
    saved(H100)
    found = json.loads(run(capsys, "tune", "--dry-run", "--suite", "cubes", "--json")[1])
    assert [f["problem"] for f in found if f["tuned"]] == ["scaled_mm int 4096x4096x4096"]


# ---- show, export, merge, clear


def test_show_lists_the_tables_of_all_machines(capsys):
    assert run(capsys, "tune", "show")[1].startswith("no tuned table in ")
    saved(H100, 4096, 512), saved(L4)
    status, out, err = run(capsys, "tune", "show")
    assert (status, err) == (0, "")
    assert f"{H100.gpu} (sm90, 132 processors; driver 580.1, Triton 3.6.0, torch 2.11.0+cu130)" in out and L4.gpu in out
    row = next(line for line in out.splitlines() if "4096x4096x4096" in line)
    rate = round(2 * 4096**3 / 140_000e-9 / 1e12)
    assert (
        row.split() == f"scaled_mm int 4096x4096x4096 portable 128x256x128 w8 s3 140.0 1.50 {rate} cublas 1.25×".split()
    )
    found = json.loads(run(capsys, "tune", "--json", "show")[1])
    assert [len(table["entries"]) for table in found] == [2, 1] and found[0]["machine"] == asdict(H100)
    assert found[0]["entries"][0] in [tuned.to_json(entry(4096)), tuned.to_json(entry(512))]


def test_show_marks_this_machine(gpu, capsys):
    saved(H100), saved(L4)
    found = json.loads(run(capsys, "tune", "show", "--json")[1])
    assert [t["this_machine"] for t in found if t["file"] != "shipped with fqt"] == [True, False]


def test_show_names_a_file_that_is_no_table_and_goes_on(capsys, cache):
    saved(H100)
    (cache / "garbage.json").write_text("{")
    status, out, err = run(capsys, "tune", "show")
    assert status == 0 and H100.gpu in out and one_line(err) and "garbage.json: no tuned table: not JSON" in err
    assert run(capsys, "tune", "show", "--file", cache / "garbage.json")[0] == 2


def test_what_is_exported_is_a_table_that_merges_elsewhere(capsys, tmp_path, cache):
    source, target = saved(H100, 4096, 512), tmp_path / "h100.json"
    status, out, _ = run(capsys, "tune", "export", target)
    assert (
        status == 0
        and "2 entries of NVIDIA H100" in out
        and [p.name for p in tmp_path.iterdir() if p != cache] == ["h100.json"]
    )
    before = set(store.load(H100))
    source.unlink()
    status, out, _ = run(capsys, "tune", "merge", target)
    assert status == 0 and f"2 entries of {H100.gpu}" in out and set(store.load(H100)) == before
    assert run(capsys, "tune", "export", target)[0] == 2  # nothing is overwritten


def test_an_exported_table_is_what_the_package_ships(capsys, tmp_path, monkeypatch):
    saved(H100)
    (tmp_path / "tables").mkdir()
    assert run(capsys, "tune", "export", tmp_path / "tables" / "h100.json")[0] == 0
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "tables")
    assert {e._replace(origin="") for e in store.shipped(replace(H100, driver="1"))} == {entry()}


def test_of_several_tables_a_verb_wants_to_know_which(capsys):
    saved(H100), saved(L4)
    for verb in (["export", "x.json"], ["clear"]):
        status, out, err = run(capsys, "tune", *verb)
        assert status == 2 and out == "" and "--file" in err and store.path(L4).name in err
    assert store.path(H100).exists() and store.path(L4).exists()


def test_merge_says_what_it_takes_and_what_it_refuses(capsys, tmp_path):
    file = saved(H100, 4096, 512, file=tmp_path / "h100.json")
    content = json.loads(file.read_text())
    content["entries"][0]["ir_override"] = "x"
    content["entries"].append(content["entries"][1] | {"source": "0" * 16, "exact": [64, 64, 64]})
    file.write_text(json.dumps(content))
    status, out, _ = run(capsys, "tune", "merge", "--json", file)
    (found,) = json.loads(out)
    assert status == 1 and found["taken"] == 1 and found["into"] == str(store.path(H100))
    unknown = next(why for why in found["refused"] if why.startswith("refused"))
    assert found["refused"] == {unknown: 1, "stale: scaled_mm": 1} and "field" in unknown
    assert len(store.load(H100)) == 1


def test_merge_adds_to_the_table_of_the_machine_that_a_file_is_of(capsys, tmp_path):
    saved(H100, 512)
    files = saved(H100, 4096, file=tmp_path / "a.json"), saved(L4, file=tmp_path / "b.json")
    assert run(capsys, "tune", "merge", *files)[0] == 0
    assert len(store.load(H100)) == 2 and len(store.load(L4)) == 1
    status, out, err = run(capsys, "tune", "merge", "--file", files[0], files[1])  # a table of another machine
    assert (
        status == 1 and "0 entries" in out and "of another machine" in err and len(store.load(H100, file=files[0])) == 1
    )


def test_clear_removes_one_table_and_says_so(gpu, capsys, cache):
    mine, other = saved(H100), saved(L4)
    status, out, _ = run(capsys, "tune", "clear")
    assert (status, out) == (0, f"removed {mine}\n") and not mine.exists() and other.exists()
    assert run(capsys, "tune", "clear")[:2] == (0, f"no table in {cache}\n")
    assert (
        run(capsys, "tune", "clear", "--file", other, "--json")[1]
        == json.dumps({"removed": [str(other)]}, indent=1) + "\n"
    )
    assert list(cache.glob("*.json")) == []


def test_where_there_is_no_table_clear_says_so(capsys, cache):
    assert run(capsys, "tune", "clear") == (0, f"no table in {cache}\n", "")


def test_clear_all_removes_every_table_and_nothing_else(capsys, cache):
    saved(H100), saved(L4)
    (cache / "notes.txt").write_text("mine")
    assert run(capsys, "tune", "clear", "--all")[0] == 0
    assert {p.name for p in cache.iterdir() if p.suffix != ".lock"} == {"notes.txt"}


def test_clear_all_leaves_other_json_files_of_the_folder_and_removes_damaged_tables(capsys, cache):
    """FQT_CACHE_DIR may be any folder."""
    (cache / "merged.json").write_bytes(saved(H100).read_bytes())
    saved(L4).write_text("{")
    (cache / "package.json").write_text("{}")
    assert run(capsys, "tune", "clear", "--all")[0] == 0
    assert [p.name for p in cache.glob("*.json")] == ["package.json"]


def test_clear_waits_for_a_writer_and_leaves_its_lock(capsys, monkeypatch):
    mine = saved(H100)
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.05)
    with store.locked(mine):
        status, _, err = run(capsys, "tune", "clear", "--file", mine)
    assert status == 2 and one_line(err) and "lock" in err and mine.exists()
    assert run(capsys, "tune", "clear", "--file", mine)[0] == 0 and not mine.exists()
    assert mine.with_name(mine.name + ".lock").exists()


def test_nothing_is_measured_that_could_not_be_saved(gpu, capsys, tmp_path):
    other = saved(L4, file=tmp_path / "l4.json")
    status, out, err = run(capsys, "tune", "--suite", "cubes", "--file", other)
    assert (status, out, gpu.calls) == (2, "", []) and "of another machine" in err and "nothing is measured" in err


def test_clear_removes_no_file_that_is_not_a_table(capsys, tmp_path):
    (tmp_path / "thesis.json").write_text("{}")
    assert (
        run(capsys, "tune", "clear", "--file", tmp_path / "thesis.json")[0] == 2 and (tmp_path / "thesis.json").exists()
    )


def test_warnings_of_fqt_are_lines_and_others_stay_warnings(capsys):
    with cli_tables.plain_warnings():
        warnings.warn("fqt: the table is full", stacklevel=1)
    assert capsys.readouterr().err == "fqt: the table is full\n"
    with pytest.warns(DeprecationWarning, match="old"), cli_tables.plain_warnings():
        warnings.warn("old", DeprecationWarning, stacklevel=1)


@pytest.mark.parametrize("asked, cubes, llama", [({}, True, True), ({"suite": ["cubes"]}, True, False),
                                                 ({"shapes": "shapes.json"}, False, False)])  # fmt: skip
def test_every_suite_is_tuned_where_nothing_is_asked_for(asked, cubes, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.json").write_text('[{"name": "mlp", "m": 640, "n": 320, "k": 160}]')
    nothing = dict(suite=None, shapes=None, model=None, recipe=None, dtype="bfloat16")
    collected = cli_tune._collect(SimpleNamespace(**nothing | asked), Target("sm90", 132))
    shapes = {(p.m, p.n, p.k) for p in collected.problems}
    assert ((1024, 1024, 1024) in shapes, (8192, 28672, 4096) in shapes) == (cubes, llama)
