"""What a result was measured on, and the file it is kept in."""

import json
from types import SimpleNamespace

import torch

import fqt
from fqt_bench import environment


def test_slug_is_a_plain_folder_name():
    assert environment.slug("NVIDIA H200") == "nvidia-h200"
    assert environment.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert environment.slug("AMD Instinct MI300X / VF") == "amd-instinct-mi300x-vf"
    assert environment.slug("../..") == "unknown"


def test_a_copy_without_git_is_named_by_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_output", lambda *command: None)
    record = environment.environment(torch.device("cpu"))
    assert record["commit"] is None and record["dirty"] is None
    assert environment.result_path(tmp_path, ["smoke"], record).name.endswith("-nogit.json")
    (tmp_path / "fqt").mkdir()
    (tmp_path / "fqt" / "a.py").write_text("x = 1\n")
    folders = {"fqt": tmp_path / "fqt"}
    before = environment.source_digest(folders)
    (tmp_path / "fqt" / "a.py").write_text("x = 2\n")
    assert environment.source_digest(folders) != before


def test_the_digest_is_of_the_sources_wherever_they_lie(tmp_path):
    for place in ("checkout", "site-packages"):
        (tmp_path / place / "below").mkdir(parents=True)
        (tmp_path / place / "below" / "a.py").write_text("x = 1\n")
    digests = {environment.source_digest({"fqt": tmp_path / place}) for place in ("checkout", "site-packages")}
    assert len(digests) == 1
    assert environment.source_digest({"fqt": tmp_path / "checkout", "b": tmp_path / "checkout"}) not in digests


def test_an_installed_package_has_no_checkout_no_commit_and_results_of_its_own(tmp_path, monkeypatch):
    module = tmp_path / "site-packages" / "fqt_bench" / "environment.py"
    module.parent.mkdir(parents=True)
    assert environment.checkout(str(module)) is None
    (tmp_path / "pyproject.toml").write_text("")  # of the project whose virtual environment it is in
    assert environment.checkout(str(tmp_path / ".venv" / "fqt_bench" / "environment.py")) is None
    monkeypatch.setattr(environment, "ROOT", None)
    record = environment.environment(torch.device("cpu"))
    assert (record["commit"], record["dirty"], record["fqt"]) == (None, None, fqt.__version__)
    assert environment.default_out().as_posix() == "fqt-bench"


def test_a_checkout_is_found_and_keeps_its_results():
    root = environment.checkout()
    assert root is not None and environment.ROOT == root and (root / "bench" / "fqt_bench" / "run.py").is_file()
    assert environment.default_out() == root / "bench" / "results"


def test_the_record_names_everything_a_figure_needs():
    record = environment.environment(torch.device("cpu"))
    needed = {
        "gpu",
        "driver",
        "capability",
        "processors",
        "torch",
        "triton",
        "cuda",
        "commit",
        "dirty",
        "date",
        "python",
    }
    assert needed <= record.keys() and record["torch"] == torch.__version__
    json.dumps(record, allow_nan=False)


def test_the_record_of_a_gpu(monkeypatch, tmp_path):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
                                 total_memory=81 * 2**30, L2_cache_size=50 * 2**20)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    smi = "580.159.04, 700.00 W, 1980 MHz, 2619 MHz, 345 MHz, 30"
    monkeypatch.setattr(environment, "_output", lambda *command: smi if command[0] == "nvidia-smi" else None)
    record = environment.environment(torch.device("cuda", 0))
    assert (record["gpu"], record["capability"], record["processors"], record["l2_mib"], record["driver"]) == (
        "NVIDIA H100 80GB HBM3", "9.0", 132, 50.0, "580.159.04")  # fmt: skip
    assert environment.result_path(tmp_path, ["kernels"], record).parent.name == "nvidia-h100-80gb-hbm3"
