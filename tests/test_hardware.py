"""`make gpu`: which parts run, that one that fails or hangs keeps no other from running, and what is left of each."""

import importlib.util
import json
import signal
import sys
import time
import zipfile
from pathlib import Path

import bench_fabricated as fabricated
import pytest
import torch

from fqt.cli import UsageError
from fqt_bench import environment, hardware, wheels
from fqt_bench.hardware import Part

ROOT = environment.ROOT


def part(code: str, seconds: float = 30.0, missing: str = "") -> Part:
    return Part("check", ("-c", code), seconds, missing)


def run_all(tmp_path, limit_s=float("inf"), **some) -> tuple[int, dict, Path]:
    status = hardware._run_all(some, tmp_path, limit_s, ROOT)
    (path,) = tmp_path.glob("*/hardware-*.json")
    return status, json.loads(path.read_text())["parts"], path.parent


def test_every_part_runs_and_leaves_what_it_printed(tmp_path, capfd):
    status, verdicts, folder = run_all(
        tmp_path,
        fails=part("import sys; print('to stdout'); sys.exit('to stderr')"),
        missing=part("raise SystemExit", missing="no data"),
        fine=part("import fqt_bench, sys; print(sys.argv[1:]); open(sys.argv[1], 'w').write('raw')")._replace(
            arguments=("-c", "import sys, fqt_bench; open(sys.argv[1], 'w').write('raw')", "{dir}/fine-{stem}.txt")
        ),
    )
    assert status == 1
    assert {name: v["status"] for name, v in verdicts.items()} == {
        "fails": "failed",
        "missing": "not run",
        "fine": "ok",
    }
    assert verdicts["missing"]["why"] == "no data" and verdicts["fails"]["returncode"] == 1
    assert verdicts["fails"]["last"] == "to stderr" and verdicts["fine"]["last"] == ""
    (log,) = folder.glob("fails-*.log")
    assert log.read_text().split() == "to stdout to stderr".split()
    assert [path.read_text() for path in folder.glob("fine-*.txt")] == ["raw"]
    assert "to stderr" in capfd.readouterr().out


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    """And told first, so that it can write what it knows."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    code = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True)\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('told', flush=True)"
    )
    before = (
        signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.getsignal(signal.SIGTERM),
    )  # as in a shell's background
    try:
        hardware._heed_signals()
        status, verdicts, folder = run_all(tmp_path, hangs=part(code, seconds=5.0), fine=part("pass"))
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert status == 1 and [v["status"] for v in verdicts.values()] == ["out of time", "ok"]
    (log,) = folder.glob("hangs-*.log")
    pid, told = log.read_text().split()[:2]
    assert told == "told"
    assert_ended(pid)


def assert_ended(pid: str) -> None:
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the process that the part started lives on")


def test_what_a_part_leaves_behind_is_ended(tmp_path):
    child = "import time; time.sleep(600)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid)"
    status, _, folder = run_all(tmp_path, leaves=part(code))
    (log,) = folder.glob("leaves-*.log")
    assert status == 0
    assert_ended(log.read_text().strip())


def test_without_platformdirs_the_store_has_a_place(tmp_path, monkeypatch):
    monkeypatch.delenv("FQT_CACHE_DIR", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "platformdirs" else find(name, *a)
    )
    _, _, folder = run_all(tmp_path, says=part("import os; print(os.environ['FQT_CACHE_DIR'])"))
    (log,) = folder.glob("says-*.log")
    assert Path(log.read_text().strip()).name == "fqt-cache"


def test_a_part_that_there_is_no_time_for_is_named(tmp_path):
    status, verdicts, _ = run_all(tmp_path, limit_s=hardware.LEAST_S / 2, late=part("pass"))
    assert status == 0 and verdicts == {"late": {"status": "not run", "why": "10 s are left"}}


def test_parts_are_chosen_by_name_or_group_in_their_order():
    found = hardware.parts(ROOT)
    assert hardware.chosen(found, []) == list(found)
    assert hardware.chosen(found, ["optim", "doctor"]) == ["doctor", "optim"]
    assert hardware.chosen(found, ["tune"]) == ["tune", "export"]
    assert set(hardware.chosen(found, ["check"])) >= {"doctor", "tests", "sanitize", "extremes", "endurance"}
    assert hardware.chosen(found, ["speed"]) == ["kernels", "layers", "profile", "calibrate", "readme"]
    with pytest.raises(ValueError, match="no part 'chekc'; there are bench, check, methods, speed, tune, doctor"):
        hardware.chosen(found, ["chekc"])


def test_every_part_is_a_command_that_there_is(tmp_path):
    """Each takes its options: none is misspelt. Their limits leave a part of 570 s whole in ten minutes."""
    found = hardware.parts(ROOT, tmp_path)
    places = {"out": "OUT", "dir": "DIR", "stem": "STEM", "results": "RESULT"}
    for name, p in found.items():
        assert p.seconds <= 570 and p.arguments[0] == "-m"
        module, *options = [argument.format(**places) for argument in p.arguments[1:]]
        parsed = _parse(module, options)
        assert parsed is None or parsed == 0, f"{name}: {module} {options}"


def test_half_an_hour_is_enough_for_speed_and_most_of_it_is_for_measuring():
    speed = {name: p.seconds for name, p in hardware.parts(ROOT).items() if p.group == "speed"}
    assert sum(speed.values()) < 25 * 60 and speed["kernels"] + speed["layers"] > sum(speed.values()) / 2
    found = hardware.parts(ROOT)
    assert not any("train" in p.arguments for name, p in found.items() if p.group == "speed")
    for name in ("kernels", "layers", "profile", "train"):  # each ends itself, with time to compile and to write
        line = list(found[name].arguments)
        limit = next(float(line[line.index(option) + 1]) for option in ("--budget-s", "--limit-s") if option in line)
        assert limit <= found[name].seconds - 30


def test_half_an_hour_is_enough_for_the_methods_and_convolutions_are_tuned_before_they_are_timed():
    methods = {name: p.seconds for name, p in hardware.parts(ROOT).items() if p.group == "methods"}
    assert list(methods) == ["householder", "optim", "tune-conv", "conv", "end-to-end", "methods-readme"]
    assert sum(methods.values()) <= 28 * 60
    for name in ("householder", "optim", "conv", "end-to-end"):
        line = list(hardware.parts(ROOT)[name].arguments)
        limit = next(float(line[line.index(option) + 1]) for option in ("--budget-s", "--limit-s") if option in line)
        assert limit <= methods[name] - 30


def _parse(module: str, options: list[str]):
    """Run a command's parser alone: None where it takes the options."""
    import argparse
    import importlib

    if module == "pytest":
        return None

    class Parsed(Exception):
        pass

    def stop(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    original, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, stop
    try:
        main = importlib.import_module("fqt.cli" if module == "fqt" else module).main
        return main(options)
    except Parsed:
        return None
    finally:
        argparse.ArgumentParser.parse_args = original


def test_the_list_says_what_would_run(capsys):
    assert hardware.main(["check", "--list"]) == 0
    text = capsys.readouterr().out
    assert "fqt doctor --repeat 100" in text and "fqt tune" not in text


@pytest.mark.interpreted
def test_without_a_gpu_nothing_runs(capsys):
    with pytest.raises(SystemExit, match="2"):
        hardware.main([])
    assert "not measured" in capsys.readouterr().err


def test_a_study_is_repeated_where_its_images_are(tmp_path):
    folder = tmp_path / "bench" / "results" / "cpu"
    folder.mkdir(parents=True)
    assert "no study" in hardware.parts(tmp_path)["resnet"].missing
    (folder / "resnet-fashion-2026-01-02.json").write_text("{}")
    assert "dataset-fashion-mnist" in hardware.parts(tmp_path, tmp_path / "none")["resnet"].missing
    resnet = hardware.parts(tmp_path, tmp_path)["resnet"]
    assert not resnet.missing and str(folder / "resnet-fashion-2026-01-02.json") in resnet.arguments
    assert sys.executable not in resnet.arguments


# ---- parts that read a result


def fabricated_result(folder: Path, name: str, date: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result = fabricated.result(fabricated.pair("gemm", "1x1x1", 2.0, "portable"), environment={"date": date})
    (folder / name).write_text(json.dumps(result))


def test_a_part_reads_the_newest_results_that_those_before_it_left(tmp_path):
    """By the date within: those of files are of the checkout. What is no result is none; what is not there is named."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = environment.result_path(tmp_path, ["x"], environment.environment(device)).parent
    code = ("-c", "import sys; print(*sys.argv[1:])", "{results}", "{stem}")
    reads = Part("speed", code, 30.0, reads=("kernels-*.json", "layers-*.json"))

    def judged():
        status, verdicts, _ = run_all(tmp_path, part=reads)
        next(folder.glob("hardware-*.json")).unlink()
        assert status == 0
        return verdicts["part"]

    assert judged() == {"status": "not run", "why": "no result kernels-*.json; no result layers-*.json"}
    fabricated_result(folder, "kernels-a.json", "2026-03-02T10:00:00+00:00")
    fabricated_result(folder, "kernels-b.json", "2026-03-01T10:00:00+00:00")
    (folder / "kernels-c.json").write_text("{}")
    fabricated_result(folder, "optim-a.json", "2026-03-03T10:00:00+00:00")
    one = judged()
    assert (one["status"], one["results"], one["why"]) == ("ok", ["kernels-a.json"], "no result layers-*.json")
    fabricated_result(folder, "layers-a.json", "2026-03-01T10:00:00+00:00")
    both = judged()
    assert both["results"] == ["kernels-a.json", "layers-a.json"] and "why" not in both
    assert both["last"].split()[:2] == [str(folder / name) for name in both["results"]]


# ---- peers without a network


def wheel(
    folder: Path, name: str = "torchao", *, version: str = "9.9", tag: str = "py3-none-any", module: str = ""
) -> Path:
    """A whole wheel of one module that has nothing but its version."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{module or name}/__init__.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-thing\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def test_carried_peers_are_seen_by_the_benchmarks_and_by_nothing_else(tmp_path, monkeypatch, capfd):
    """Over whatever is installed, with their version, and only while the parts run."""
    wheel(tmp_path / "carried")
    code = (
        "import importlib.metadata as m, sys; seen = [p for p in sys.path if 'fqt-wheels' in p]\n"
        "print(m.version('torchao') if seen else '-', seen)"
    )
    some = {name: Part(name, ("-c", code), 60.0) for name in ("speed", "bench", "check")}
    monkeypatch.setattr(hardware, "parts", lambda root, fashion: some)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = environment.environment
    monkeypatch.setattr(environment, "environment", lambda device: real(torch.device("cpu")))
    monkeypatch.setattr(hardware, "_heed_signals", lambda: None)
    monkeypatch.setenv("FQT_WHEELS", str(tmp_path / "carried"))
    assert hardware.main(["--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("*/hardware-*.json")
    file = json.loads(path.read_text())
    assert file["wheels"] == {"torchao": "9.9"} and "FQT_WHEELS: torchao 9.9" in capfd.readouterr().out
    last = {name: v["last"] for name, v in file["parts"].items()}
    assert last["speed"].startswith("9.9 ['/") and last["bench"] == last["speed"] and last["check"].endswith("[]")
    assert not Path(last["speed"].partition("['")[2].rstrip("']")).exists()


REFUSED = {
    "torch": ({"name": "torch"}, "refused: it would take the place of the installed torch"),
    "numpy": ({"name": "NumPy"}, "refused: it would take the place of the installed numpy"),
    "triton": ({"name": "triton"}, "the installed triton"),
    "triton by another name": ({"name": "pytorch_triton", "module": "triton"}, "the installed"),
    "torch within another": ({"name": "peer", "module": "torch"}, "the installed torch"),
    "torch as data": ({"name": "peer", "module": "peer-9.9.data/purelib/torch"}, "the installed torch"),
    "our own": ({"name": "fqt_kernels", "module": "fqt"}, "the installed fqt-kernels"),
    "another machine's": ({"tag": "cp27-cp27m-win_amd64"}, "not a supported wheel on this platform"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wheel_that_does_not_fit_or_would_shadow_is_refused_by_name(tmp_path, case):
    options, words = REFUSED[case]
    path = wheel(tmp_path / "carried", **options)
    with pytest.raises(UsageError, match=words) as failed:
        wheels.install(path.parent, tmp_path / "target")
    assert path.name in str(failed.value) and not list((tmp_path / "target").glob("*"))


def test_what_is_no_wheel_is_named(tmp_path):
    for folder, words in ((tmp_path / "none", "not a folder"), (tmp_path, "no wheel is in it")):
        with pytest.raises(UsageError, match=words):
            wheels.install(folder, tmp_path / "target")
    (tmp_path / "torchao.whl").write_text("")
    with pytest.raises(UsageError, match=r"torchao.whl: not the name of a wheel"):
        wheels.install(tmp_path, tmp_path / "target")
    (tmp_path / "torchao.whl").rename(tmp_path / "torchao-1-py3-none-any.whl")
    with pytest.raises(UsageError, match="not a whole wheel"):
        wheels.install(tmp_path, tmp_path / "target")
    (tmp_path / "torchao-1-py3-none-any.whl").unlink()
    for version in ("1", "2"):
        wheel(tmp_path, version=version)
    with pytest.raises(UsageError, match="a second wheel of torchao"):
        wheels.install(tmp_path, tmp_path / "target")


def test_a_wheel_that_is_refused_keeps_all_from_running(tmp_path, monkeypatch, capsys):
    wheel(tmp_path / "carried", "torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "_heed_signals", lambda: None)
    monkeypatch.setattr(hardware, "_run_all", lambda *_: pytest.fail("it ran"))
    monkeypatch.setenv("FQT_WHEELS", str(tmp_path / "carried"))
    with pytest.raises(SystemExit, match="2"):
        hardware.main(["speed"])
    assert "torch-9.9-py3-none-any.whl: refused" in capsys.readouterr().err
