"""Source trees of fqt to measure, the installed one or any other, and processes that import the library from one of them.

A tree is a folder that holds `fqt/`, and `fqt_kernels/` beside it or in `kernels/`: a checkout, or what `pip install
--target` makes. The benchmark code is always that of the running tool.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fqt.cli import UsageError

_PACKAGE = Path(__file__).resolve().parent
# Run by `python -c`: this very fqt_bench, but fqt and fqt_kernels from the tree, which may hold another fqt_bench as well.
_BOOT = """
import importlib.util, json, os, runpy, sys
package, roots, module, *sys.argv[1:] = sys.argv[1:]
start = os.path.join(package, "__init__.py")
spec = importlib.util.spec_from_file_location("fqt_bench", start, submodule_search_locations=[package])
sys.modules["fqt_bench"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fqt_bench"])
from fqt_bench.library import use
if json.loads(roots):
    use(json.loads(roots))
runpy.run_module(f"fqt_bench.{module}", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Tree:
    """Folders to import fqt and fqt_kernels from, the digest of their sources, and how the user named them."""

    name: str
    roots: tuple[Path, ...]
    digest: str

    @staticmethod
    def at(folder: Path | str, name: str = "") -> Tree:
        """The tree in a folder.

        Raises:
            UsageError: there is none.
        """
        folder = Path(folder).resolve()
        kernels = folder if (folder / "fqt_kernels").is_dir() else folder / "kernels"
        packages = folder / "fqt", kernels / "fqt_kernels"
        for package in packages:
            if not (package / "__init__.py").is_file():
                raise UsageError(f"{name or folder} holds no fqt: there is no {package.name}/__init__.py in it")
        return Tree(name or str(folder), tuple(dict.fromkeys((folder, kernels))), _digest(packages))

    @staticmethod
    def installed() -> Tree:
        """The library that this process imports."""
        packages = [Path(importlib.util.find_spec(name).origin).parent for name in ("fqt", "fqt_kernels")]
        return Tree("installed", tuple(dict.fromkeys(package.parent for package in packages)), _digest(packages))


def _digest(packages: Sequence[Path]) -> str:
    """Of the names and contents of all files but compiled Python."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{package.name}/{path.relative_to(package).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def materialize(spec: str, repo: Path, into: Path) -> Tree:
    """A copy, in the new folder `into`, of the fqt in a folder or a git revision, which nobody edits during a measurement.

    Raises:
        UsageError: spec is neither a folder nor a revision of the repository, or holds no fqt.
    """
    into.mkdir(parents=True)
    if Path(spec).is_dir():
        return _copy(Tree.at(spec, spec), into)
    archive = into / "archive.zip"
    git = ["git", "-C", str(repo)]
    if _run([*git, "rev-parse", "--git-dir"]).returncode:
        raise UsageError(f"{spec!r} is no folder, and {str(repo)!r} is no git repository to look it up in")
    commit = _run([*git, "rev-parse", "--verify", "--quiet", f"{spec}^{{commit}}"])
    if commit.returncode:
        raise UsageError(
            f"{spec!r} is neither a folder nor a revision of {str(repo)!r} (a shallow clone has only the newest ones)"
        )
    top = _run([*git, "rev-parse", "--show-toplevel"]).stdout.strip() or str(repo)  # a bare repository has no top
    made = _run(["git", "-C", top, "archive", "--format=zip", f"--output={archive}", commit.stdout.strip()])
    if made.returncode:
        raise UsageError(f"git archive {spec}: {made.stderr.strip()}")
    with zipfile.ZipFile(archive) as z:
        z.extractall(into / "all", [n for n in z.namelist() if n.startswith(("fqt/", "fqt_kernels/", "kernels/"))])
    tree = _copy(Tree.at(into / "all", spec), into)
    archive.unlink()
    shutil.rmtree(into / "all")
    return tree


def _copy(tree: Tree, into: Path) -> Tree:
    for package, root in (("fqt", tree.roots[0]), ("fqt_kernels", tree.roots[-1])):
        shutil.copytree(root / package, into / package, ignore=shutil.ignore_patterns("__pycache__"))
    return Tree(tree.name, (into,), tree.digest)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError:
        raise UsageError(f"{command[0]} is not installed, and revisions cannot be read without it") from None


def command(module: str, arguments: Sequence[str], tree: Tree | None = None) -> list[str]:
    """What runs a module of fqt_bench, with the library of the tree, or with none yet (`library.use`)."""
    roots = [str(root) for root in tree.roots] if tree else []
    return [sys.executable, "-c", _BOOT, str(_PACKAGE), json.dumps(roots), module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """The variables of such a process.

    Triton's settings change what it emits, and TRITON_INTERPRET keeps it from compiling: none is handed on but in more.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **more}
