"""The command line of benchmarks: what it refuses, and that it imports nothing before it must."""

import subprocess
import sys
import types

import pytest

from fqt import cli
from fqt_bench.suites import NAMES


@pytest.mark.parametrize(
    "arguments",
    [["--suite"], ["--suite", "all"], ["--device", "tpu"], ["--budget", "1", "--budget-s", "60"], ["--out"], ["extra"]]
    + [[option, text] for option in ("--budget", "--budget-s") for text in ("0", "-1", "nan", "inf", "soon", "1e9")],
)
def test_a_call_that_makes_no_sense_exits_2_and_prints_no_data(arguments, capsys):
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "error:" in captured.err


@pytest.mark.parametrize(("arguments", "seconds"), [([], 420), (["--budget", "2"], 120), (["--budget-s", "90"], 90)])
def test_the_options_mean_what_they_say(arguments, seconds, monkeypatch):
    from fqt_bench import run

    seen = []
    monkeypatch.setattr(run, "main", lambda args: seen.append(args) or 0)
    assert cli.main(["bench", "--suite", *NAMES[::-1], "smoke", *arguments]) == 0
    assert (seen[0].budget_s, seen[0].suite) == (seconds, list(NAMES[::-1]))
    assert cli.main(["bench"]) == 0
    assert (seen[1].suite, seen[1].device, seen[1].out, seen[1].json) == (["smoke"], "auto", None, False)


@pytest.mark.parametrize(("name", "module"), [("compare", "fqt_bench.compare"), ("report", "fqt_bench.page")])
def test_a_subcommand_is_its_modules(name, module, monkeypatch):
    made = types.ModuleType(module)
    made.add_arguments = lambda parser: parser.add_argument("what")
    made.run = lambda args: 7 if args.what == "this" else 8
    monkeypatch.setitem(sys.modules, module, made)
    assert cli.main(["bench", name, "this"]) == 7
    assert cli.main(["bench", name, "that"]) == 8
    assert cli.main(["bench", name]) == 2


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["bench", "compare", "--help"],
                                       ["bench", "report", "--help"], ["bench", "--suite", "x"]])  # fmt: skip
def test_nothing_heavy_is_imported_before_a_command_runs(arguments):
    heavy = "torch triton numpy matplotlib jsonschema".split()
    light = (
        "fqt_bench.compare fqt_bench.page".split()
        if arguments[:2] not in (["bench", "compare"], ["bench", "report"])
        else []
    )
    code = (f"import sys; from fqt.cli import main; status = main({arguments}); "
            f"sys.exit([m for m in {heavy + light} if m in sys.modules] or status * ('x' not in {arguments}))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
