"""The store: whatever is in a file, reading is a hit or a counted miss; whenever a writer dies, nothing saved is lost."""

import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import stat
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fqt import safefile, store, tuned
from fqt.cli import UsageError
from fqt.store import Machine, load, save
from fqt.tuned import EMPTY, Entry, Key, Timing, bucket, to_json

H100 = Machine("NVIDIA H100 80GB HBM3", "sm90", 132, "580.1", "3.6.0", "2.11.0+cu130")
FORK = multiprocessing.get_context("fork")  # children inherit what is imported: starting one takes milliseconds
BUCKETS = sorted({bucket(size) for size in range(1, 4096)})


# A kernel and a configuration of each op, and a kind.
KNOWN = {
    "scaled_mm": ("portable", (128, 128, 128, 8, 3), ""), "quantize": ("tile", (64, 128, 8), "per_row nearest rows"),
    "quantize_gradient": ("tile", (64, 128, 8), "per_row per_column"), "conv": ("implicit", (64, 64, 64, 4, 4), "9 taps"),
    "conv_wgrad": ("implicit", (64, 64, 128, 4, 4), "9 taps"),
    "quantize_images": ("tile", (64, 1, 128, 8), "per_row nearest both"),
    "quantize_gradient_images": ("tile", (64, 1, 128, 8), "per_row per_column"), "arrange_filters": ("torch", (), ""),
}  # fmt: skip


def entry(m=4096, n=4096, k=4096, ns=1000, op="scaled_mm") -> Entry:
    kernel, config, kind = KNOWN[op]
    dtype = "" if op in tuned.CODES_ONLY else "bfloat16"
    timing = Timing(kernel, config, 1, ns)
    aligned = int(n % 16 == k // (9 if op == "conv" else 1) % 16 == 0)
    return Entry(Key(op, "int", dtype, kind, aligned, bucket(m), bucket(n), bucket(k)), (timing,), 0, (m, n, k))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """A cache directory, counts and warnings of the test's own."""
    monkeypatch.setenv("FQT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_counts", type(store._counts)())
    monkeypatch.setattr(store, "_said", set())
    store.sources()  # before a test forks or changes its user


def written(content) -> Path:
    """The machine's file, with this content."""
    file = store.path(H100)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


def content(*entries: Entry, **more) -> dict:
    items = [{"source": store.sources()[e.key.op]} | to_json(e) for e in entries]
    return {"schema": store.SCHEMA, "machine": asdict(H100), "entries": items} | more


def said(call):
    """(what the call returns, the texts of its warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught]


def missed(reason: str) -> bool:
    """Whether loading twice is twice a miss for this reason, said once."""
    (first, second), texts = said(lambda: (load(H100), load(H100)))
    assert store.counts() == {f"miss: {reason}": 2} and first is second is EMPTY
    assert len(texts) == 1 and reason in texts[0] and str(store.path(H100)) in texts[0]
    return True


def entries_of(table) -> set[Entry]:
    return set(table)


def test_what_is_saved_is_loaded_and_the_newest_of_a_key_wins():
    assert load(H100) is EMPTY and store.counts() == {"miss: no file": 1}
    _, texts = said(lambda: (save(H100, [entry(), entry(64)]), save(H100, [entry(ns=7), entry(128)])))
    assert texts == [] and entries_of(load(H100)) == {entry(ns=7), entry(64), entry(128)}
    assert store.counts() == {"miss: no file": 1, "saved": 4, "hit": 1}
    assert stat.S_IMODE(store.path(H100).stat().st_mode) == 0o600
    assert [file.name for file in store.directory().iterdir() if file.suffix not in (".json", ".lock")] == []


def test_the_environment_names_the_place_or_it_is_not_known_without_platformdirs(monkeypatch, tmp_path):
    assert store.path(H100).parent == tmp_path / "cache"
    assert store.path(H100).name.startswith("nvidia-h100-80gb-hbm3-sm90-")
    monkeypatch.setitem(__import__("sys").modules, "platformdirs", None)  # importing it would raise
    assert store.directory() == tmp_path / "cache"
    monkeypatch.delenv("FQT_CACHE_DIR")
    with pytest.raises(UsageError, match="set FQT_CACHE_DIR"):
        store.directory()
    for warned in (2, 0):  # an operator that asks for its table goes on without
        (table, written), texts = said(lambda: (load(H100), save(H100, [entry()])))
        assert table is EMPTY and not written
        assert len(texts) == warned and all("platformdirs is not installed" in text for text in texts)
    monkeypatch.undo()


def test_without_the_environment_s_place_it_is_the_platform_s_cache(monkeypatch, tmp_path):
    pytest.importorskip("platformdirs")  # a machine with a GPU may have nothing but torch, Triton and pytest
    monkeypatch.delenv("FQT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.directory() == tmp_path / "xdg" / "fqt"


def test_every_fact_of_the_machine_has_a_file_of_its_own():
    changes = dict(gpu="NVIDIA H200", arch="sm100", processors=114, driver="581", triton="3.7.1", torch="2.12.0")
    assert changes.keys() == asdict(H100).keys()
    others = [replace(H100, **{name: value}) for name, value in changes.items()]
    assert len({store.path(machine) for machine in [H100, *others]}) == len(others) + 1
    save(H100, [entry()])
    for machine in others:
        assert load(machine) is EMPTY  # a changed GPU, Triton, ... finds nothing
        shutil.copy(store.path(H100), store.path(machine))
        assert said(lambda machine=machine: load(machine))[0] is EMPTY  # not even under its own name
    assert store.counts()["miss: of another machine"] == len(others)
    assert entries_of(load(H100)) == {entry()}


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A copy of the kernels' sources, of which sources() is now; change(name) changes one file, and back."""
    folder = tmp_path / "kernels"
    shutil.copytree(store.kernels(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(store, "kernels", lambda: folder)
    store.sources.cache_clear()

    def change(name: str, back: bool = False) -> None:
        with (folder / name).open("r+b") as f:
            end = f.seek(0, os.SEEK_END)
            f.truncate(end - len(b"# changed\n")) if back else f.write(b"# changed\n")
        store.sources.cache_clear()

    yield change
    store.sources.cache_clear()


# A convolution may be launched as a product of matrices.
PRODUCTS, IMAGES = set(tuned.PRODUCTS), {"quantize_images", "quantize_gradient_images"}


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("gemm.py", PRODUCTS), ("gemm_hopper.py", PRODUCTS), ("gemm_cublas.py", PRODUCTS), ("_gluon.py", PRODUCTS),
        ("gradient.py", {"quantize_gradient", *IMAGES}), ("quantize.py", {"quantize", "quantize_gradient", *IMAGES}),
        ("statistics.py", {"quantize", "quantize_gradient", *IMAGES}), ("conv.py", {"conv"}),
        ("conv_wgrad.py", {"conv_wgrad"}), ("conv_quantize.py", IMAGES), ("conv_statistics.py", IMAGES),
        ("_device.py", set(tuned.OPS) - {"arrange_filters"}), ("__init__.py", set()),
    ],
)  # fmt: skip
def test_a_changed_kernel_invalidates_exactly_its_own_op_and_the_way_back_revives_it(file, stale, sources, monkeypatch):
    entries = {op: entry(op=op, k=0 if "quantize" in op else 576) for op in tuned.OPS}
    save(H100, entries.values())
    sources(file)
    table, texts = said(lambda: load(H100))
    assert {e.key.op for e in table} == set(tuned.OPS) - stale
    assert {what for what in store.counts() if what.startswith("stale")} == {f"stale: {op}" for op in stale}
    assert len(texts) == len(stale) and all("fqt tune" in text for text in texts)
    save(H100, [e._replace(bf16_ns=9) for e in entries.values()])  # tuned again, beside the old ones
    assert said(lambda: {e.bf16_ns for e in load(H100)}) == ({9}, [])
    sources(file, back=True)
    assert {e.key.op: e.bf16_ns for e in load(H100)} == {op: 0 if op in stale else 9 for op in tuned.OPS}


def test_entries_of_other_kernels_keep_configurations_that_this_code_lacks(sources, monkeypatch):
    theirs = entry(64)._replace(ranking=(Timing("flash", (1, 2, 3), 1, 5),))
    with monkeypatch.context() as patch:
        patch.setattr(tuned, "_check_candidates", lambda *args: None)
        save(H100, [theirs])
    sources("gemm.py")
    save(H100, [entry()])
    assert entries_of(load(H100)) == {entry()} and not any("refused" in what for what in store.counts())
    sources("gemm.py", back=True)
    with monkeypatch.context() as patch:
        patch.setattr(tuned, "_check_candidates", lambda *args: None)
        assert entries_of(load(H100)) == {theirs}
    assert said(lambda: len(load(H100)))[0] == 0  # under its own hash it is refused as long as the code lacks it


def test_every_kernel_source_is_hashed_for_some_op():
    named = {name for names in store._SOURCES.values() for name in names}
    untuned = {
        "grouping.py",
        "householder.py",
        "householder_sums.py",
        "gemm_householder.py",
        "position.py",
        "int8_step.py",
    }
    untuned |= {file.name for file in store.kernels().glob("psgd*.py")}
    assert named == {file.name for file in store.kernels().glob("*.py")} - {"__init__.py"} - untuned


DEEP = b'{"schema": 1, "machine": {}, "entries": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
BAD = {
    "truncated": (lambda: json.dumps(content(entry())).encode()[:-9], "not JSON"),
    "empty": (lambda: b"", "not JSON"),
    "garbage": (lambda: bytes(range(256)) * 9, "not JSON"),
    "deep": (lambda: DEEP, "not JSON"),
    "NaN": (lambda: json.dumps(content() | {"schema": float("nan")}).encode(), "not JSON"),
    "a field twice": (lambda: json.dumps(content()).encode()[:-1] + b', "schema": 1}', "not JSON"),
    "gigantic": (lambda: json.dumps(content(entry())).encode() + b" " * store.MAX_BYTES, "too large"),
    "an older schema": (lambda: content(entry(), schema=0), "of another schema"),
    "a list": (lambda: [content(entry())], "of another schema"),
    "one more field": (lambda: content(entry(), code="import os"), "of another schema"),
    "no machine": (lambda: content(machine=None), "of another schema"),
    "a machine of other fields": (lambda: content(machine={"gpu": "x"}), "of another schema"),
    "a machine of other types": (lambda: content(machine=asdict(H100) | {"gpu": ["x"]}), "of another schema"),
    "entries of no list": (lambda: content(entries={}), "of another schema"),
    "another machine": (lambda: content(machine=asdict(replace(H100, driver="1"))), "of another machine"),
}


def test_a_file_says_which_machine_it_is_of_or_why_it_is_no_table():
    save(H100, [entry()])
    assert store.machine_of(store.path(H100)) == H100
    with pytest.raises(ValueError, match="no tuned table: not JSON"):
        store.machine_of(written(b"{"))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_a_miss_that_is_counted_said_once_and_healed_by_saving(name):
    make, reason = BAD[name]
    written(make())
    assert missed(reason)
    assert save(H100, [entry()]) and entries_of(load(H100)) == {entry()}


@pytest.mark.parametrize("name", ["not JSON", "of another machine"])
def test_a_file_that_the_user_named_is_never_overwritten_unless_it_is_a_table_of_this_machine(name, tmp_path):
    file = tmp_path / "notes.json"
    before = b"my notes" if name == "not JSON" else json.dumps(content(machine=asdict(replace(H100, gpu="x")))).encode()
    file.write_bytes(before)
    done, texts = said(lambda: save(H100, [entry()], file=file))
    assert not done and file.read_bytes() == before and store.counts() == {f"not saved: {name}": 1} and len(texts) == 1
    file.unlink()
    assert save(H100, [entry()], file=file) and save(H100, [entry(64)], file=file)
    assert entries_of(load(H100, file=file)) == {entry(), entry(64)} and load(H100) is EMPTY


def test_entries_that_tuning_could_not_have_written_are_counted_said_once_and_their_neighbours_used():
    good, bad = content(entry())["entries"][0], entry(64)
    items = content(bad, bad, bad, bad, bad, bad)["entries"]
    items[0]["ir_override"] = "/tmp/evil.ttir"
    items[1]["ranking"][0]["ir_override"] = "/tmp/evil.ttir"
    items[2]["ranking"][0]["config"] = [128, 128, 128, 8, 4096]
    items[3]["source"] = "../../evil"
    del items[4]["source"]
    items[5]["bf16_ns"] = 10**400
    file = written(content(entries=[*items, 3, good]))
    assert '"bf16_ns": 1000' in file.read_text()
    (table, _), texts = said(lambda: (load(H100), load(H100)))
    assert entries_of(table) == {entry()} and len(texts) == 4
    counted = {
        "an unknown field": 4, "a configuration that the code does not have": 2, "no hash of its kernels": 6,
        "a non-integer where an integer belongs": 2,
    }  # fmt: skip
    assert store.counts() == {"hit": 2} | {f"refused: {why}": n for why, n in counted.items()}
    save(H100, [entry(128)])
    assert json.loads(file.read_text())["entries"] == content(entry(), entry(128))["entries"]


@pytest.mark.parametrize("what", ["a link", "a dangling link", "a pipe", "a folder"])
def test_what_stands_in_the_file_s_place_is_neither_followed_nor_waited_for_nor_replaced(what, tmp_path):
    target, file = tmp_path / "elsewhere.json", store.path(H100)
    file.parent.mkdir()
    if what == "a link":
        target.write_text(json.dumps(content(entry())))
    if what == "a pipe":
        os.mkfifo(file)
    elif what == "a folder":
        file.mkdir()
    else:
        file.symlink_to(target)
    assert missed("a symbolic link" if "link" in what else "no regular file")
    kind = stat.S_IFMT(file.lstat().st_mode)
    assert not said(lambda: save(H100, [entry(64)]))[0] and stat.S_IFMT(file.lstat().st_mode) == kind
    assert not target.exists() or json.loads(target.read_text()) == content(entry())


def test_reading_leaves_no_file_open_whatever_it_finds(tmp_path):
    """The number of the next file that is opened stays what it was."""

    def next_fd() -> int:
        os.close(fd := os.open(tmp_path, os.O_RDONLY))
        return fd

    before, file = next_fd(), store.path(H100)
    for make in (lambda: written(content(entry())), lambda: written(b"{"), lambda: file.unlink(), lambda: file.mkdir()):
        make()
        said(lambda: load(H100))
        assert next_fd() == before


def test_what_others_may_have_written_is_not_trusted():
    file = written(content(entry()))
    file.chmod(0o666)
    assert missed("writable by anyone")
    assert save(H100, [entry(64)]) and entries_of(load(H100)) == {entry(64)}  # nothing of it was taken over
    store._counts.clear(), store._said.clear()
    file.parent.chmod(0o777)
    assert missed("in a folder that anyone may write to")
    assert not said(lambda: save(H100, [entry()]))[0]
    file.rename(file.with_suffix(".aside"))
    assert not said(lambda: save(H100, [entry()]))[0] and not file.exists()  # it would not be read
    file.with_suffix(".aside").rename(file)
    file.parent.chmod(0o1777)  # sticky: others cannot replace the file
    assert entries_of(load(H100)) == {entry(64)}


def unprivileged(call, *args):
    """call(*args) in a process of a user who is not root: (its result, the warnings' texts, the counts)."""

    def run(results) -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        results.send((*said(lambda: call(*args)), store.counts()))

    import filelock  # noqa: F401  # here: the other user may not read the libraries

    ours, theirs = FORK.Pipe(duplex=False)
    child = FORK.Process(target=run, args=(theirs,))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        child.join()


@pytest.fixture
def open_folder(monkeypatch):
    """The cache directory, in a place that every user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    monkeypatch.setenv("FQT_CACHE_DIR", str(folder))
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder_serves_readers_and_saving_is_counted_and_said_once(open_folder):
    save(H100, [entry()])
    file = store.path(H100)
    file.chmod(0o644)
    Path(f"{file}.lock").unlink()
    open_folder.chmod(0o555)
    result, texts, counts = unprivileged(lambda: (save(H100, [entry(64)]), save(H100, [entry(128)]), set(load(H100))))
    assert result == (False, False, {entry()}) and len(texts) == 1 and "Permission denied" in texts[0]
    assert counts["not saved: Permission denied"] == 2 and counts["hit"] == 1


def test_a_file_without_permission_is_a_miss_and_is_left_alone(open_folder):
    file = written(content(entry()))
    open_folder.chmod(0o1777)
    os.chmod(file, 0)
    (table, done), texts, counts = unprivileged(lambda: (len(load(H100)), save(H100, [entry(64)])))
    assert (table, done) == (0, False) and counts["miss: Permission denied"] == 1 and len(texts) == 2
    assert json.loads(file.read_bytes() if os.geteuid() == 0 else file.chmod(0o600) or file.read_bytes()) == content(
        entry()
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_the_file_of_another_user_is_a_miss_and_root_s_is_not(open_folder):
    file = written(content(entry()))
    assert unprivileged(lambda: len(load(H100)))[0] == 1
    os.chown(file, 65533, 65533)
    assert missed("of another user")
    assert not said(lambda: save(H100, [entry(64)]))[0] and json.loads(file.read_text()) == content(entry())


def test_a_place_that_cannot_be_written_is_counted_and_said_once(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FQT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (first, second, table), texts = said(lambda: (save(H100, [entry()]), save(H100, [entry()]), load(H100)))
    assert (first, second, table) == (False, False, EMPTY) and len(texts) == 2  # one of saving, one of loading
    assert store.counts() == {"not saved: Not a directory": 2, "miss: Not a directory": 1}


def test_a_full_disk_leaves_the_old_file_and_no_litter(monkeypatch):
    save(H100, [entry()])

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done, texts = said(lambda: save(H100, [entry(64)]))
    assert not done and len(texts) == 1 and store.counts()["not saved: No space left on device"] == 1
    assert entries_of(load(H100)) == {entry()} and not list(store.directory().glob("*.tmp"))


def test_a_file_system_without_locks_is_said_once_and_never_raises(monkeypatch):
    def locked(file):
        raise NotImplementedError("FileSystem does not appear to support flock")  # as filelock 3.12 does

    monkeypatch.setattr(store, "locked", locked)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not store.save(H100, [entry()]) and not store.save(H100, [entry()])
    assert len(caught) == 1 and "does not appear to support flock" in str(caught[0].message)


def test_a_lock_that_is_never_released_is_given_up_on(monkeypatch):
    import filelock

    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.05)
    store.directory().mkdir()
    with filelock.FileLock(f"{store.path(H100)}.lock"):
        done, texts = said(lambda: save(H100, [entry()]))
    assert not done and store.counts() == {"not saved: another process holds its lock": 1} and len(texts) == 1


def test_a_full_table_drops_the_oldest_and_says_so(monkeypatch):
    monkeypatch.setattr(store, "MAX_ENTRIES", 3)
    _, texts = said(lambda: [save(H100, [entry(m)]) for m in (16, 32, 48, 16, 64, 80)])
    assert {e.exact[0] for e in load(H100)} == {16, 64, 80}  # 16 was measured again
    assert store.counts()["dropped"] == 2 and len(texts) == 1
    one = store.path(H100).stat().st_size
    monkeypatch.setattr(store, "MAX_ENTRIES", 1024)
    monkeypatch.setattr(store, "MAX_BYTES", 2 * one)
    said(lambda: save(H100, [entry(m) for m in BUCKETS]))
    assert one < store.path(H100).stat().st_size <= 2 * one
    newest = [e.exact[0] for e in load(H100)]
    assert len(newest) > 3 and newest == BUCKETS[-len(newest) :]


def test_an_entry_that_no_table_may_hold_is_the_caller_s_mistake():
    with pytest.raises(ValueError, match="1 with a configuration that the code does not have"):
        save(H100, [entry()._replace(ranking=(Timing("portable", (1, 2, 3), 1, 5),))])
    assert not store.directory().exists()


def test_litter_of_killed_writers_is_removed_when_it_is_old():
    save(H100, [entry()])
    old, new, other = (Path(f"{store.path(H100)}.{name}.tmp") for name in ("old", "new", "x"))
    other = other.with_name("other-table.json.old.tmp")
    for file in (old, new, other):
        file.write_text("half a fi")
    for file in (old, other):
        os.utime(file, (time.time() - 2 * safefile.OLD_S,) * 2)
    save(H100, [entry(64)])
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)


@pytest.mark.parametrize("moment", ["mkstemp", "fdopen", "fsync", "replace"])
@pytest.mark.parametrize("after", [False, True])
def test_a_writer_killed_at_any_step_leaves_the_old_table_or_the_new_one_and_no_lock(moment, after, monkeypatch):
    save(H100, [entry()])
    module = tempfile if moment == "mkstemp" else os
    real = getattr(module, moment)

    def dies(*args, **kwargs):
        if after:
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        setattr(module, moment, dies)
        save(H100, [entry(64)])

    child = FORK.Process(target=write)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    table, texts = said(lambda: load(H100))
    assert texts == [] and entries_of(table) == {entry()} | ({entry(64)} if moment == "replace" and after else set())
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 1.0)
    assert save(H100, [entry(128)]) and entry(128) in entries_of(load(H100))


def _writer(worker: int, first: int, acknowledged: int) -> None:
    """Save one entry after another; after each the parent is told its number, which a kill cannot tear."""
    for i in range(first, len(BUCKETS)):
        if save(H100, [entry(BUCKETS[worker], BUCKETS[i], 64)]):
            os.write(acknowledged, bytes((worker, i)))


def test_sixteen_writers_being_killed_at_random_lose_no_acknowledged_entry_and_readers_see_whole_tables():
    reading, writing = os.pipe()
    dice, next_of = random.Random(0), [0] * 16
    acknowledged: set[tuple[int, int]] = set()

    def start(worker: int):
        child = FORK.Process(target=_writer, args=(worker, next_of[worker], writing), daemon=True)
        child.start()
        return child

    def collect() -> None:
        """What was acknowledged since; waits for one at least."""
        assert select.select([reading], [], [], 20)[0], "no writer gets on"
        data = os.read(reading, 1 << 16)
        for worker, i in zip(data[::2], data[1::2], strict=True):
            acknowledged.add((worker, i))
            next_of[worker] = i + 1

    def found() -> set[tuple[int, int]]:
        return {(BUCKETS.index(e.exact[0]), BUCKETS.index(e.exact[1])) for e in load(H100)}

    children = [start(worker) for worker in range(16)]
    for _ in range(12):
        collect()
        time.sleep(dice.random() * 0.02)  # anywhere within a save
        victims = dice.sample(range(16), 4)
        for victim in victims:
            children[victim].kill()
        expected = set(acknowledged)
        assert expected <= found(), "an acknowledged entry is lost"
        for victim in victims:
            children[victim].join()
            children[victim] = start(victim)
    for child in children:
        child.kill()
        child.join()
    os.close(writing)
    while select.select([reading], [], [], 0)[0] and (data := os.read(reading, 1 << 16)):
        acknowledged.update(zip(data[::2], data[1::2], strict=True))
    os.close(reading)
    assert acknowledged <= found() and len(acknowledged) >= 12
    assert store.counts().keys() <= {"hit", "miss: no file"}, "a reader met half a file"
