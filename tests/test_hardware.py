"""`make gpu`: which parts run, that one that fails or hangs keeps no other from running, and what is left of each."""

import importlib.util
import json
import signal
import sys
import time
from pathlib import Path

import pytest

from fqt_bench import environment, hardware
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
    with pytest.raises(ValueError, match="no part 'chekc'; there are bench, check, tune, doctor"):
        hardware.chosen(found, ["chekc"])


def test_every_part_is_a_command_that_there_is(tmp_path):
    """Each takes its options: none is misspelt. Their limits leave a part of 570 s whole in ten minutes."""
    found = hardware.parts(ROOT, tmp_path)
    places = {"out": "OUT", "dir": "DIR", "stem": "STEM"}
    for name, p in found.items():
        assert p.seconds <= 570 and p.arguments[0] == "-m"
        module, *options = [argument.format(**places) for argument in p.arguments[1:]]
        parsed = _parse(module, options)
        assert parsed is None or parsed == 0, f"{name}: {module} {options}"


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
