"""Random streams: seeds, steps, ranks, checkpoints and replicas."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import fqt


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    fqt.quantize_(net, "psq3")
    return net


def step(net, optimizer, i):
    g = torch.Generator().manual_seed(i)
    optimizer.zero_grad()
    net(torch.randn(6, 16, generator=g)).square().sum().backward()
    optimizer.step()


def parameters(net):
    return [p.detach().clone() for p in net.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def gradient(net):
    net.zero_grad()
    net(torch.ones(6, 16).cumsum(1)).square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def test_manual_seed_restarts_present_and_future_layers():
    net = model()
    fqt.manual_seed(7)
    first, second = gradient(net), gradient(net)
    assert not equal(first, second)
    fqt.manual_seed(7)
    assert equal(first, gradient(net)) and equal(second, gradient(net))
    assert equal(first, gradient(model()))
    fqt.manual_seed(8)
    assert not equal(first, gradient(net))


def test_neither_torchs_generator_nor_its_seed_plays_a_part():
    net = model()
    fqt.set_step(0)
    first = gradient(net)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    fqt.set_step(0)
    assert equal(first, gradient(net)) and torch.equal(state, torch.get_rng_state())


def test_set_step_pins_the_counter_of_all_layers_or_of_a_model():
    a, b = model(), model()
    gradient(a)
    fqt.set_step(5)
    first = gradient(a)
    fqt.set_step(5, a)
    assert equal(first, gradient(a))
    assert a[0]._fqt_rng[1] == 6 and b[0]._fqt_rng[1] == 5
    for bad in (-1, 2**32, 1.0, True):
        with pytest.raises(ValueError, match=str(bad)):
            fqt.set_step(bad)
    with pytest.raises(TypeError, match="seed"):
        fqt.manual_seed("7")


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    fqt.manual_seed(3)
    for i in range(3):
        step(net, optimizer, i)
    torch.save(
        {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "fqt": fqt.get_rng_state(net)}, tmp_path / "c"
    )
    for i in range(3, 6):
        step(net, optimizer, i)

    fqt.manual_seed(1234)  # a fresh process
    resumed = model()
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.01, momentum=0.9)
    checkpoint = torch.load(tmp_path / "c", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    fqt.set_rng_state(resumed, checkpoint["fqt"])
    for i in range(3, 6):
        step(resumed, optimizer, i)
    assert equal(parameters(net), parameters(resumed))


def test_a_state_that_does_not_fit_is_refused_by_name():
    net = model()
    state = fqt.get_rng_state(net)
    other = nn.Sequential(nn.Linear(4, 4))
    fqt.quantize_(other, "int8")
    with pytest.raises(ValueError, match="2"):
        fqt.set_rng_state(other, state)
    with pytest.raises(ValueError, match="not a state"):
        fqt.set_rng_state(net, {"layers": {}})
    state["layers"]["2"] = torch.zeros(3)
    before = net[0]._fqt_rng.clone()
    with pytest.raises(ValueError, match="'2'"):
        fqt.set_rng_state(net, state)
    assert torch.equal(net[0]._fqt_rng, before)


def test_data_parallel_ranks_draw_different_bits_for_their_gradients(monkeypatch):
    from fqt import rng

    net = model()
    fqt.set_step(0)
    first = gradient(net)
    monkeypatch.setattr(rng, "rank", lambda: 1)
    fqt.set_step(0)
    assert not equal(first, gradient(net))


def run_distributed(body: str, world: int = 2) -> None:
    """Run `body` (which sees rank and world) on gloo ranks, each a process; an error on any rank fails."""
    script = textwrap.dedent("""
        import os, sys, torch, fqt
        import torch.distributed as dist
        from torch import nn
        torch.set_num_threads(1)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=world)
        def same(t):
            parts = [torch.empty_like(t) for _ in range(world)]
            dist.all_gather(parts, t.contiguous())
            return all(torch.equal(parts[0], p) for p in parts)
    """) + textwrap.dedent(body)
    # Without this gloo's threads may still run while the interpreter takes them down.
    script += "\ndist.barrier()\ndist.destroy_process_group()\n"
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "STORE": f"{folder}/store", "WORLD_SIZE": str(world)}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script], env={**env, "RANK": str(r)}, stderr=subprocess.PIPE, text=True
            )
            for r in range(world)
        ]
        errors = [p.communicate(timeout=240)[1] for p in processes]
        for process, error in zip(processes, errors, strict=True):
            assert process.returncode == 0, error[-3000:]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp_replicas_stay_identical_while_their_bits_differ():
    run_distributed("""
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
        fqt.quantize_(net, "psq3")
        ddp = nn.parallel.DistributedDataParallel(net)
        x = torch.ones(6, 16).cumsum(1)
        # The same batch on every rank: the local gradients still differ, because the bits do.
        with ddp.no_sync():
            ddp(x).square().sum().backward()
        assert not same(net[0].weight.grad), "ranks share their random bits"
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
        for i in range(3):
            optimizer.zero_grad()
            ddp(torch.randn(6, 16, generator=torch.Generator().manual_seed(10 * i + rank))).square().mean().backward()
            optimizer.step()
        assert all(same(p.data) for p in net.parameters())
        assert same(net[0]._fqt_rng)
    """)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_fsdp2_trains_like_one_process():
    """With the same batch everywhere and full-precision gradients the sharded run equals the plain one: no stale weight."""
    run_distributed("""
        from torch.distributed.fsdp import fully_shard
        def build():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
            fqt.quantize_(net, "qat8")
            return net
        plain, net = build(), build()
        fully_shard(net[0]), fully_shard(net)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (plain, net)]
        for i in range(4):
            x = torch.randn(6, 16, generator=torch.Generator().manual_seed(i))
            losses = []
            for m, optimizer in zip((plain, net), optimizers):
                optimizer.zero_grad()
                loss = m(x).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            # The mean over two equal gradients is exact; only the order of a float32 sum may differ.
            assert abs(losses[0] - losses[1]) <= 1e-6 * abs(losses[0]), (i, losses)
    """)
