"""The command line: what it prints where, its exit status, and what it must not import."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from fqt import __version__, cli, demo, doctor


def run(*code_and_args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *code_and_args], capture_output=True, text=True, timeout=120)


def one_line(text: str) -> bool:
    return len(text.strip().splitlines()) == 1 and "Traceback" not in text


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["doctor", "--help"], ["demo", "--bits", "1"]])
def test_nothing_heavy_is_imported_before_a_command_runs(arguments):
    heavy = "torch triton rich numpy matplotlib sklearn mlxtend".split()
    code = f"import sys; from fqt.cli import main; main({arguments}); sys.exit(any(m in sys.modules for m in {heavy}))"
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_python_m_fqt_is_the_command():
    result = run("-m", "fqt", "--version")
    assert (result.returncode, result.stdout) == (0, f"fqt {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["--json"], ["demo", "--seeds", "0"], ["demo", "--epochs", "x"], ["demo", "--device", "tpu"]]
    + [["demo", "--bits", bits] for bits in ("1", "9", "x", "-4", "2.5", "")]
    + [["demo", "--bits"], ["doctor", "extra"]],
)
def test_a_call_that_makes_no_sense_exits_2_and_prints_no_data(arguments, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "error:" in captured.err


def test_bits_outside_the_range_are_named(capsys):
    cli.main(["demo", "--bits", "2", "9"])
    assert "from 2 to 8, got '9'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="the demo's extras are not installed")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "below")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and one_line(captured.err) and "--out" in captured.err


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert one_line(err := capsys.readouterr().err) and "sees no GPU" in err


@pytest.mark.parametrize("missing", [["matplotlib"], ["mlxtend", "sklearn"]])
def test_a_missing_extra_is_one_line_that_says_what_to_install(missing, monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert one_line(err := capsys.readouterr().err) and demo.INSTALL in err


def test_ctrl_c_exits_130_with_one_line(monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and one_line(captured.err)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import fqt.doctor as d, sys; d.run = lambda: {'ok': True, 'x': list(range(10**6))}; from fqt.cli import main; "
    )
    code += "sys.exit(main(['doctor', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.wait(timeout=120), process.stderr.read()) == (0, "")
    process.stderr.close()


def test_json_goes_to_stdout_alone(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run", lambda: {"ok": False})
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"ok": False}


def test_columns_of_a_table_line_up():
    assert cli.table(("a", "bb"), [("xxx", "1"), ("y", "22")], right=(1,)) == "a    bb\n---  --\nxxx   1\ny    22"
