"""Ranks of torch.distributed use rank 0's table, or say who does not; ranks that call at any time never deadlock."""

import json
import multiprocessing
import threading
import time
import traceback
import warnings
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fqt import ranks, store, tuned, tuning
from fqt.dispatch import Problem
from fqt.store import Machine
from fqt.tuned import Entry, Table, Timing

H100 = Machine("NVIDIA H100 80GB HBM3", "sm90", 132, "580.1", "3.6.0", "2.11.0+cu130")
GPU = torch.device("cuda", 0)
FORK = multiprocessing.get_context("fork")  # children inherit what is imported: starting one takes milliseconds


def entry(m=4096, ns=1000) -> Entry:
    problem = Problem("scaled_mm", m, 4096, 4096, device="cuda", arch="sm90", processors=132, triton="3.6.0")
    return Entry(tuned.key(problem), (Timing("portable", (128, 128, 128, 8, 3), 1, ns),), 0, (m, 4096, 4096))


RANK_0 = Table([entry(), entry(64)])
OWN = Table([entry(ns=5), entry(128)])


def together(size: int, call, tmp_path, store_of=dist.FileStore, join=True) -> list:
    """Of every rank of a gloo group (what call(rank) returns, the texts of its warnings)."""

    def run(rank: int, results) -> None:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                place = dist.FileStore(str(tmp_path / "store"), size) if store_of is dist.FileStore else store_of(rank)
                if join:
                    dist.init_process_group(
                        "gloo", store=place, rank=rank, world_size=size, timeout=timedelta(seconds=20)
                    )
                results.send((call(rank), [str(w.message) for w in caught if str(w.message).startswith("fqt")]))
                results.recv()  # nobody leaves before all are done: rank 0 may hold the store
        except BaseException:
            results.send(traceback.format_exc())

    pipes, children = [], []
    for rank in range(size):
        ours, theirs = FORK.Pipe()
        children.append(FORK.Process(target=run, args=(rank, theirs), daemon=True))
        children[-1].start()
        theirs.close()
        pipes.append(ours)
    answers = [pipe.recv() if pipe.poll(30) else "no answer" for pipe in pipes]
    for pipe in pipes:
        pipe.send(None)
    for child in children:
        child.join(5)
        child.kill()
    assert not any(isinstance(answer, str) for answer in answers), answers
    return answers


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("FQT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_counts", type(store._counts)())
    monkeypatch.setattr(store, "_said", set())
    monkeypatch.setattr(tuning, "_generation", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the children of a process that uses one have none
    store.sources()


def agreed(rank: int, own: Table, machine: Machine = H100, timeout_s: float = 10.0) -> str:
    return ranks.agree(own, machine, timeout_s).digest


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_uses_rank_0_s_table_though_they_call_at_different_times(size, tmp_path):
    def call(rank: int):
        time.sleep((0.1, 0.0, 0.2, 0.05)[rank])  # rank 0 is not the first
        used = ranks.agree(RANK_0 if rank == 0 else OWN, H100, 10.0)
        return used.digest, {e.origin for e in used}, tuning.agreement(timeout_s=10.0, strict=True)

    answers = together(size, call, tmp_path)
    for rank, ((digest, origins, digests), texts) in enumerate(answers):
        assert digest == RANK_0.digest != OWN.digest and texts == []
        assert origins == ({""} if rank == 0 else {"rank 0"})
        assert digests == dict.fromkeys(range(size), RANK_0.digest)


def test_the_process_group_may_keep_its_values_in_a_tcp_store(tmp_path):
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def place(rank: int):
        return dist.TCPStore("127.0.0.1", first.port, is_master=False)

    answers = together(2, lambda rank: agreed(rank, RANK_0 if rank == 0 else OWN), tmp_path, place)
    assert answers == [(RANK_0.digest, [])] * 2


def test_a_rank_with_another_gpu_uses_its_own_table_and_is_named(tmp_path):
    def call(rank: int):
        machine = replace(H100, gpu="NVIDIA A100", arch="sm80", processors=108) if rank == 1 else H100
        used = agreed(rank, RANK_0 if rank == 0 else OWN, machine)
        digests = tuning.agreement(timeout_s=10.0)
        with pytest.raises(RuntimeError, match=r"^ranks \[1\] use other tuned tables than rank 0$"):
            tuning.agreement(timeout_s=10.0, strict=True)
        return used, digests

    answers = together(3, call, tmp_path)
    expected = {0: RANK_0.digest, 1: OWN.digest, 2: RANK_0.digest}
    assert [used for (used, _), _ in answers] == list(expected.values())
    assert all(digests == expected for (_, digests), _ in answers)
    assert [len(texts) for _, texts in answers] == [1, 2, 1]
    assert "rank 1 has another GPU than rank 0" in answers[1][1][0] and "A100" in answers[1][1][0]
    assert all("ranks [1] use other" in texts[-1] for _, texts in answers)


def test_ranks_whose_other_versions_are_the_only_difference_agree(tmp_path):
    def call(rank: int):
        return agreed(rank, RANK_0 if rank == 0 else OWN, replace(H100, driver=str(rank), torch=str(rank)))

    assert together(2, call, tmp_path) == [(RANK_0.digest, [])] * 2


def test_entries_that_a_rank_cannot_use_are_refused_by_its_name_and_the_disagreement_is_seen(tmp_path):
    bad = entry(128)._replace(ranking=(Timing("portable", (1, 2, 3), 1, 1),))

    def call(rank: int):
        if rank == 2:  # other kernels of products
            store.sources = lambda: dict.fromkeys(tuned.OPS, "0" * 16)
        used = ranks.agree(Table([*RANK_0, bad]) if rank == 0 else OWN, H100, 10.0)
        return len(used), tuning.agreement(timeout_s=10.0)

    answers = together(3, call, tmp_path)
    assert [n for (n, _), _ in answers] == [3, 2, 0]
    assert "rank 1 refused 1 of the 3 entries of rank 0's tuned table: a configuration" in answers[1][1][0]
    assert "rank 2 refused 3 of the 3 entries of rank 0's tuned table: other sources" in answers[2][1][0]
    assert all("ranks [1, 2] use other tuned tables than rank 0" in texts[-1] for _, texts in answers)
    assert len({digests[rank] for (_, digests), _ in answers for rank in digests}) == 3


EMPTY_MESSAGE = b'{"machine": {}, "sources": {}, "entries": []}'


@pytest.mark.parametrize(
    "message",
    [b"\x80\x04pickle", b"[]", b"[" * 100_000, b'{"machine": 1}', EMPTY_MESSAGE + b" " * ranks.MAX_BYTES],
    ids=["pickle", "list", "deep", "other", "gigantic"],
)
def test_a_message_that_is_no_table_is_refused_and_never_raises(message, tmp_path):
    values = dist.HashStore()
    values.set("table", message)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            assert ranks._of_rank_0(values, OWN, H100, 1.0) is OWN
        finally:
            dist.destroy_process_group()
    assert len(caught) == 1 and "refused rank 0's tuned table and uses its own" in str(caught[0].message)


def test_a_rank_0_that_stays_silent_is_waited_for_no_longer_than_the_timeout(tmp_path):
    def call(rank: int):
        if rank == 0:
            time.sleep(1.0)
            return None
        start = time.monotonic()
        used = agreed(rank, OWN, timeout_s=0.2)
        digests = tuning.agreement(timeout_s=0.1)
        return used, digests, time.monotonic() - start < 0.9

    (_, quiet), ((used, digests, soon), texts) = together(2, call, tmp_path)
    assert quiet == [] and used == OWN.digest and digests == {0: None, 1: OWN.digest} and soon
    assert len(texts) == 2 and "rank 1 got no tuned table from rank 0 within 0.2 s and uses its own" in texts[0]
    assert "ranks [0] did not say within 0.1 s" in texts[1]


def test_a_second_group_on_the_same_store_replaces_what_the_first_one_left():
    """So that a rank that read the first group's table before differs by its digest."""
    place = dist.HashStore()
    for table in (RANK_0, OWN):
        dist.init_process_group("gloo", store=place, rank=0, world_size=1)
        try:
            assert ranks.agree(table, H100, 1.0) is table
            assert ranks._values(0).get("table") == ranks._message(table, H100)
            ranks.agree(Table(), replace(H100, gpu="NVIDIA A100"), 1.0)  # of another GPU of the process, later
            assert ranks.digests(Table(), 1.0) == {0: table.digest}
        finally:
            dist.destroy_process_group()


def test_waiting_for_rank_0_leaves_the_store_to_the_other_threads(tmp_path):
    """Rank 1 waits for the table, rank 0 for a value that another thread of rank 1 then sets."""

    def call(rank: int):
        values = ranks._values(7)
        if rank == 0:
            values.wait(["go"], timedelta(seconds=8))
            return agreed(0, RANK_0)
        waiter = threading.Timer(0.2, lambda: values.set("go", b""))
        waiter.start()
        return agreed(1, OWN, timeout_s=8.0)

    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = lambda rank: dist.TCPStore("127.0.0.1", first.port, is_master=False)  # noqa: E731
    assert together(2, call, tmp_path, place) == [(RANK_0.digest, [])] * 2


def test_the_active_table_of_a_gpu_is_rank_0_s_from_its_first_use_in_a_group_and_own_tuning_is_refused(tmp_path):
    def call(rank: int):
        Machine.of = staticmethod(lambda device: H100)
        store.load = lambda machine, file=None: RANK_0 if rank == 0 else OWN
        alone = tuning.table(GPU).digest
        place = dist.FileStore(str(tmp_path / "late"), 2)
        dist.init_process_group("gloo", store=place, rank=rank, world_size=2, timeout=timedelta(seconds=20))
        with pytest.raises(RuntimeError, match="2 ranks would tune apart"):
            tuning.enable()
        group = tuning.table(GPU).digest
        store.load = lambda machine, file=None: OWN if rank == 0 else RANK_0
        tuning.reload()
        return alone, group, tuning.table(GPU).digest

    tuning.reload()
    answers = together(2, call, tmp_path, join=False)
    assert [texts for _, texts in answers] == [[], []]
    assert answers[0][0] == (RANK_0.digest, RANK_0.digest, OWN.digest)
    assert answers[1][0] == (OWN.digest, RANK_0.digest, OWN.digest)


def test_the_table_travels_as_json():
    assert set(json.loads(ranks._message(RANK_0, H100))) == {"machine", "sources", "entries"}
