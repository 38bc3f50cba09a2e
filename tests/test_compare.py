"""`fqt bench compare`: the trees it takes, what it reports, and kernels made slower on purpose."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fqt.cli import UsageError, main
from fqt_bench import compare, counters, summary, timed, trees
from fqt_bench.counters import Counters
from fqt_bench.duel import Arena, Duel, duels
from fqt_bench.gate import CASES, Timing
from fqt_bench.trees import Tree, materialize

ROOT = Path(__file__).resolve().parents[1]


# ---- trees


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repo(tmp_path):
    """A repository with two versions of an fqt of two files: tagged old, and in the working tree."""
    folder = tmp_path / "repo"
    for package in ("fqt", "kernels/fqt_kernels"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("version = 1\n")
    git(tmp_path, "init", "-q", "repo")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    git(folder, "tag", "old")
    (folder / "fqt" / "__init__.py").write_text("version = 2\n")
    return folder


def test_a_revision_and_the_folder_it_was_made_of_are_the_same_tree(repo, tmp_path):
    old = materialize("old", repo, tmp_path / "a")
    new = materialize(str(repo), repo, tmp_path / "b")
    assert old.digest != new.digest
    assert (old.roots[0] / "fqt" / "__init__.py").read_text() == "version = 1\n"
    git(repo, "checkout", "-q", "--", ".")
    (repo / "fqt" / "__pycache__").mkdir()
    (repo / "fqt" / "__pycache__" / "x.pyc").write_bytes(b"compiled")
    assert materialize(str(repo), repo, tmp_path / "c").digest == old.digest
    assert (new.roots[0] / "fqt" / "__init__.py").read_text() == "version = 2\n", (
        "a copy, which later edits do not reach"
    )
    # From a subfolder of the repository, and as `pip install --target` lays it out.
    assert materialize("old", repo / "fqt", tmp_path / "d").digest == old.digest
    assert Tree.at(tmp_path / "a").digest == old.digest


def test_what_is_no_tree_is_a_usage_error_that_names_it(repo, tmp_path):
    for spec, at, words in (
        ("nothing", repo, "'nothing' is neither a folder nor a revision"),
        ("--help", repo, "'--help' is neither"),
        ("old", tmp_path / "repo" / ".." / "..", "no git repository"),
        (str(tmp_path), repo, "holds no fqt"),
    ):
        with pytest.raises(UsageError, match=words):
            materialize(spec, at, tmp_path / f"into {words}")
    assert main(["bench", "compare", "nothing", str(repo), "--repo", str(repo)]) == 2


def test_a_process_imports_the_library_from_its_tree_or_not_at_all(repo, tmp_path):
    tree = materialize("old", repo, tmp_path / "a")
    run = [sys.executable, "-c", "import sys, json; from fqt_bench.library import use; use(sys.argv[1:]); import fqt;"
           "print(fqt.version)"]  # fmt: skip
    env = {**trees.environment(), "PYTHONPATH": str(ROOT / "bench")}
    done = subprocess.run([*run, *map(str, tree.roots)], env=env, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
    # What pip install --target makes holds a benchmark too: the running one is used.
    (tree.roots[0] / "fqt_bench").mkdir()
    (tree.roots[0] / "fqt_bench" / "__init__.py").write_text("raise SystemExit('the tree's own benchmark')")
    done = subprocess.run(trees.command("library", [], tree), cwd=tree.roots[0], env=trees.environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tree.roots[0] / "fqt_kernels")
    done = subprocess.run([*run, *map(str, tree.roots)], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "fqt_kernels is imported from" in done.stderr


# ---- the command


def arguments(*given):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args(given)


@pytest.fixture
def counted(monkeypatch):
    """counted(base, head): what the trees old and new of `repo` are said to count."""

    def pretend(base, head, **head_has):
        sides = iter((Counters(base), Counters(head, **head_has)))
        monkeypatch.setattr(counters, "measure", lambda *_: next(sides))

    return pretend


def test_the_status_is_1_where_a_counter_grew_and_stdout_names_it(repo, counted, capsys, tmp_path):
    name = "sm_90 _rows_kernel n4096"
    run = ["bench", "compare", "old", str(repo), "--repo", str(repo), "--counters-only"]
    counted({name: {"registers": 32, "loads": 4}}, {name: {"registers": 40, "loads": 3}})
    assert main([*run, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "**1 regression**" in printed
    assert "registers 32 → 40" in printed
    assert "| loads | 4 | 3 | -25.0 % | less |" in printed
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert document["regressions"] == [f"{name}: registers 32 → 40"]
    assert "Not compared" not in printed
    counted({name: {"registers": 32}}, {name: {"registers": 40}})
    assert main([*run, "--tolerance", "registers=25", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counters"]["changes"][0]["kind"] == "tolerated"
    counted({name: {"registers": 32}}, {"another": {"registers": 99}})
    assert main(run) == 0
    printed = capsys.readouterr().out
    assert "Only in head:\n- another\n\nOnly in base:" in printed
    assert "No regression. **Not compared: 1 kernels or steps that base has and head has not**" in printed
    counted({name: {"registers": 32}}, {}, failed={"sm_90 ? n4096": "CompilationError"})
    assert main(run) == 1, "what no longer compiles is a regression"
    counted({name: {"registers": 32}}, {}, unknown={"sm_90 ? n4096": "no such launch"})
    assert main(run) == 0


def test_where_neither_tree_could_be_counted_or_timed_the_status_is_2(repo, capsys):
    run = ["bench", "compare", "old", str(repo), "--repo", str(repo), "--counters-only"]
    failed = {"sm_90 ?": "ImportError: no triton"}
    for side in ({"failed": failed}, {"unknown": failed}):
        both = iter([Counters({}, **side)] * 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(counters, "measure", lambda *_, both=both: next(both))
            assert main(run) == 2
        assert "nothing could be compared: no counter" in capsys.readouterr().err
    neither = Timing("scaled_mm", "failed", Duel("scaled_mm", [], [], {}, {"base": "boom", "head": "boom"}))
    result = compare.Comparison(Tree("a", (), "1"), Tree("b", (), "2"), "now", {}, None, [neither])
    assert (result.blind, result.regressions) == (["timing"], [])


def test_a_folder_that_cannot_be_written_is_a_mistake_before_anything_is_counted(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(counters, "measure", lambda *_: pytest.fail("counted"))
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        out = ["--out", str(tmp_path / place), "--counters-only"]
        assert main(["bench", "compare", "old", "old", "--repo", str(repo), *out]) == 2
    monkeypatch.delenv("FQT_CACHE_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert main(["bench", "compare", "old", "old", "--repo", str(repo)]) == 2, "nowhere to keep the noise"


@pytest.mark.parametrize(
    "more", [["--tolerance", "speed=3"], ["--tolerance", "registers=-1"], ["--tolerance", "registers"],
             ["--timings-only", "--only", "no such case"], ["--counters-only", "--timings-only"], ["--rounds", "0"]],
)  # fmt: skip
def test_a_wrong_option_is_a_usage_error(repo, more, monkeypatch):
    monkeypatch.setattr(counters, "measure", lambda *_: Counters({}))
    assert main(["bench", "compare", "old", "old", "--repo", str(repo), *more]) == 2


def test_a_slower_case_is_a_regression_with_its_name_and_a_broken_one_too():
    slow, fine = Duel("scaled_mm", [1000], [1200], {}, {}), Duel("linear int8 step", [1000], [1001], {}, {})
    broken = Duel("linear bhq8 step", [], [], {}, {"head": "RuntimeError: boom"})
    timings = [Timing("scaled_mm", "regression", slow, slow, 0.05, 20), Timing(fine.name, "same", fine, None, 0.05, 20),
               Timing(broken.name, "failed", broken)]  # fmt: skip
    result = compare.Comparison(Tree("a", (), "1"), Tree("b", (), "2"), "now", {}, None, timings)
    assert result.regressions == ["scaled_mm: +20.0 % time", "linear bhq8 step: fails: RuntimeError: boom"]
    text = summary.markdown(result)
    assert "| scaled\\_mm | 0.001 | 0.001 | 1.200, again 1.200 | 5.1 % | **slower** |" in text
    assert "failed in head: RuntimeError: boom" in text
    assert [t["status"] for t in summary.document(result)["timings"]] == ["regression", "same", "failed"]


# ---- the real thing


@pytest.fixture
def slowed(tmp_path, monkeypatch):
    """slowed(file, old, new): a copy of the library with one edit of a kernel's file."""
    monkeypatch.chdir(ROOT)

    def edit(file, old, new):
        for package in ("fqt", "kernels/fqt_kernels"):
            shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        path = tmp_path / "kernels" / "fqt_kernels" / file
        text = path.read_text()
        assert text.count(old) == 1, "the kernel has changed: write this edit anew"
        path.write_text(text.replace(old, new))
        return str(tmp_path)

    return edit


def test_a_lost_vector_load_is_found_without_a_gpu(slowed, capsys):
    """Rows that are not known to begin at multiples of 16 bytes are read element by element."""
    head = '@triton.jit(do_not_specialize=["stream"])\ndef _rows_kernel('
    folder = slowed("quantize.py", head, head.replace('["stream"]', '["stream", "stride_xm"]'))
    only = "sm_90 _rows_kernel n4096 min stochastic"
    assert main(["bench", "compare", ".", folder, "--counters-only", "--only", only, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert any(line.startswith(f"{only}: loads ") for line in document["regressions"])
    base, head = (document["counters"][side][only] for side in ("base", "head"))
    assert base["loads_16"] == 4
    assert "loads_16" not in head
    assert head["loads_2"] == 32


def test_an_extra_pass_over_the_input_is_found_without_a_gpu(slowed, capsys):
    call = "    lowest = tl.full((BLOCK_M, BLOCK_N), -2147483648, tl.int32)\n    hi, lo = widen(lowest, lowest,"
    again = """    x, mask_m, mask_n = load_multiplied(
        x_ptr, mul_ptr, first_m, 0, M, N, stride_xm, stride_xn, stride_mul, MUL_ROWS, BLOCK_M, BLOCK_N, WIDE
    )
"""
    folder = slowed("quantize.py", call, again + call)
    only = "step int8 linear _rows_kernel"
    assert main(["bench", "compare", ".", folder, "--counters-only", "--only", only]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("- "))
    name, _, grew = line.replace("\\", "").removeprefix("- ").partition(": bytes_loaded ")
    old, new = map(int, grew.split(" → "))
    assert name == only
    assert new == 2 * old


def test_identical_code_is_timed_by_turns_and_a_case_that_a_tree_lacks_is_said(tmp_path):
    """One real round: that both sides were timed, in as many rounds; how long it took is the machine's."""
    assert set(timed.CASES) == set(CASES)
    here = Tree.at(ROOT)
    with Arena() as arena:
        fought, missing = duels(arena, here, here, ["scaled_mm", "no such case"], rounds=1)
    assert fought.timed, (fought.unknown, fought.failed)
    assert len(fought.base) == len(fought.head) == 1
    assert min(fought.base + fought.head) > 0
    assert set(missing.unknown) == {"base", "head"}
    assert missing.base == []


def test_a_bug_of_head_is_a_failure_whatever_it_raises_and_no_tuned_table_is_read(slowed):
    """An exception from within the library is not taken for an operator that the tree does not have yet."""
    edited = Path(slowed("gemm.py", "import triton\n", "import triton  # another kernel\n"))
    path = edited / "fqt" / "ops.py"
    path.write_text(path.read_text() + "\n\ndef scaled_mm(*args, **options):\n    raise ValueError('a bug')\n")
    with Arena() as arena:
        (fought,) = duels(arena, Tree.at(ROOT), Tree.at(edited), ["scaled_mm"], rounds=1)
        variables = Path(f"/proc/{arena.process.pid}/environ").read_bytes().split(b"\0")
    assert fought.failed == {"head": "ValueError: a bug"}
    assert fought.unknown == {}
    assert f"FQT_CACHE_DIR={arena.cache.name}".encode() in variables
    assert not Path(arena.cache.name).exists()
