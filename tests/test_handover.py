"""Laws of the hand-over of rows' magnitudes from layer to layer: right or nothing, whatever autograd and hooks do."""

import random
import threading

import laws
import pytest
import torch

import fqt
from fqt import ranges
from fqt.ranges import Handover, Rows


def magnitudes(x):
    """Bits of the largest magnitude of each row."""
    return x.float().abs().amax(1).view(torch.int32)


class Layer(torch.autograd.Function):
    """A layer whose backward leaves the magnitudes of dX, and tests those it takes against dY itself."""

    @staticmethod
    def forward(ctx, x, w, handover, log):
        ctx.save_for_backward(w)
        ctx.handover, ctx.log = handover, log
        return x @ w.t()

    @staticmethod
    def backward(ctx, dy):
        (w,) = ctx.saved_tensors
        rows = ctx.handover.take(dy)
        ctx.log.append(rows is not None)
        if rows is not None:
            laws.assert_same(rows.absmax, magnitudes(dy), "the magnitudes handed over")
        dx = dy @ w
        ctx.handover.leave(dx, Rows(magnitudes(dx), exact=True))
        return dx, None, None, None


class Net:
    """Layers between given widths around one hand-over; `log` says of each backward whether it took anything."""

    def __init__(self, handover=None):
        self.handover, self.log = handover or Handover(), []

    def layer(self, x, width=None):
        return Layer.apply(x, torch.randn(width or x.shape[-1], x.shape[-1]), self.handover, self.log)


def source(m=6, k=4):
    return torch.randn(m, k, requires_grad=True)


def test_a_layer_takes_what_the_one_above_left_through_views_of_all_rows():
    net = Net()
    h = net.layer(source(), 8)
    h = net.layer(h.reshape(2, 3, 8).reshape(6, 8), 4)
    net.layer(h.view(6, 4).unsqueeze(0).squeeze(0)).sum().backward()
    assert net.log == [False, True, True]
    assert net.handover.counts == {"left": 3, "none": 1, "taken": 2}


def test_two_layers_take_one_gradient():
    net, x = Net(), source()
    net.layer(net.layer(x) + net.layer(x)).sum().backward()
    assert net.log == [False, True, True]


@torch.library.custom_op("test_ranges::write", mutates_args=("g",))
def write(g: torch.Tensor) -> None:
    g.detach().numpy()[1] = 9  # which autograd does not see; that the operator says so it does


CHANGES = {
    "mul_": lambda g: g.mul_(2),
    "part": lambda g: g[1:].mul_(2),
    "flat part": lambda g: g.view(-1)[5:6].fill_(9),
    "detached": lambda g: g.detach().mul_(2),
    "foreach": lambda g: torch._foreach_mul_([g], 2.0),
    "out": lambda g: torch.mul(g, 2, out=g),
    "copy_": lambda g: g.copy_(torch.randn_like(g)),
    "set_": lambda g: g.set_(torch.randn_like(g)),
    "custom operator": lambda g: write(g),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_hook_that_writes_to_the_gradient_is_seen(change):
    net = Net()
    h = net.layer(source())
    h.register_hook(lambda g: (CHANGES[change](g), None)[1])
    net.layer(h).sum().backward()
    assert net.log == [False, False]
    assert net.handover.counts["none" if change == "set_" else "changed"] >= 1


def test_a_hook_that_returns_another_gradient_is_seen():
    for replace in (lambda g: g * 2, lambda g: g.clone(), lambda g: g.flip(0), lambda g: g.t().contiguous().t()):
        net = Net()
        h = net.layer(source(4, 4))
        h.register_hook(replace)
        net.layer(h).sum().backward()
        assert net.log == [False, False]


@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_autograd_adds_to_is_seen(first):
    """In place or not: the sum into a buffer that autograd owns alone keeps its address and raises its version."""
    net = Net()
    h = net.layer(source())
    both = (net.layer(h).sum(), (h * 3).sum())
    sum(both if first else both[::-1]).backward()
    assert net.log == [False, False] and net.handover.counts["changed"] <= 1


def test_autograd_adds_in_place_though_a_hand_over_watches():
    """A hand-over that held on to gradients would make autograd allocate; the sum of many is where it shows."""
    addresses, net = [], Net()
    h = net.layer(source())
    h.register_hook(lambda g: addresses.append((g.data_ptr(), g._version)))
    k = net.layer(h)
    k.register_hook(lambda g: None)
    ((h * 3).sum() + k.sum()).backward()
    assert addresses[0][1] >= 1 and net.log == [False, False]


VIEWS = {
    "transposed": lambda h: h.t(),
    "other rows": lambda h: h.view(3, 2, 4).transpose(0, 1).reshape(6, 4),
    "wider": lambda h: h.view(3, 8),
    "narrower": lambda h: h.view(12, 2),
    "some rows": lambda h: h[1:5],
    "some columns": lambda h: h[:, 1:3],
    "every other row": lambda h: h[::2],
    "one row many times": lambda h: h[:1].expand(5, 4),
    "negated": lambda h: -h,
    "half": lambda h: h.to(torch.bfloat16).float(),
    "relu": torch.relu,
    "dropout": lambda h: torch.dropout(h, 0.5, True),
    "padded": lambda h: torch.nn.functional.pad(h, (0, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_no_view_of_all_rows_takes_nothing(view):
    net = Net()
    net.layer(VIEWS[view](net.layer(source()))).sum().backward()
    assert net.log == [False, False]


def test_a_reused_address_takes_nothing():
    """Memory that was freed and comes back: address, shape and version are the same, the storage is another."""
    handover, memory = Handover(), bytearray(6 * 4 * 4)
    again = lambda value: torch.frombuffer(memory, dtype=torch.float32).view(6, 4).fill_(value)  # noqa: E731

    class Reuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            for freed in (True, False) * 20:
                dx = again(1.0)
                handover.leave(dx, Rows(magnitudes(dx), True))
                before = (dx.data_ptr(), dx._version)
                assert handover.take(dx.view(6, 4)) is not None
                if freed:
                    del dx
                other = again(2.0)
                assert (other.data_ptr(), other._version) == before
                assert handover.take(other) is None
            return dy

    Reuse.apply(source()).sum().backward()
    assert handover.counts == {"left": 40, "taken": 40, "none": 40} and len(handover._left) <= 2


def test_gradients_are_not_kept_alive_and_few_magnitudes_are():
    handover = Handover(limit=3)
    kept, alive = [], []

    class Many(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            for i in range(10):
                dx = torch.full_like(dy, float(i))
                handover.leave(dx, Rows(magnitudes(dx), True))
                kept.append(dx)
            assert len(handover._left) == 3
            assert [handover.take(dx) is not None for dx in kept] == [False] * 7 + [True] * 3
            references = [left.storage for left in handover._left.values()]
            kept.clear()
            del dx
            alive.extend(not r.expired() for r in references)
            return dy

    Many.apply(source()).sum().backward()
    assert alive == [False] * 3


def test_nothing_is_left_outside_of_a_backward_pass_nor_taken_in_another():
    """A gradient that is kept and passed on by hand, unscaled in between by an operator that raises no version."""
    net, x, below = Net(), source(), None
    with torch.no_grad():
        net.handover.leave(x.detach(), Rows(magnitudes(x.detach()), True))
        assert net.handover.take(x.detach()) is None and not net.handover.counts
    net.layer(x).sum().backward()
    left = net.handover._left[x.grad.untyped_storage()._cdata]
    assert left.identity[1] == x.grad.data_ptr() and left.identity[0] == x.grad._version
    torch._amp_foreach_non_finite_check_and_unscale_([x.grad], torch.zeros(1), torch.tensor(0.125))
    below = net.layer(source())
    below.backward(x.grad)
    assert net.log == [False, False] and net.handover.counts["place"] == 1


def test_a_retained_graph_takes_each_pass_s_own():
    net = Net()
    y = net.layer(net.layer(source())).sum()
    for factor in (1.0, 5.0, 0.25):
        y.backward(torch.tensor(factor), retain_graph=True)
    assert net.log == [False, True] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_take_right_or_nothing(reentrant):
    from torch.utils.checkpoint import checkpoint

    net = Net()
    weights = [torch.randn(4, 4) for _ in range(4)]
    block = lambda x, i: Layer.apply(  # noqa: E731
        Layer.apply(x, weights[i], net.handover, net.log), weights[i + 1], net.handover, net.log
    )
    x = source()
    y = checkpoint(block, checkpoint(block, x, 0, use_reentrant=reentrant), 2, use_reentrant=reentrant)
    y.sum().backward()
    # A reentrant checkpoint is a backward pass of its own: nothing crosses its border.
    assert net.log == [False, True, not reentrant, True]


def test_create_graph_modes_and_subclasses_leave_nothing():
    from torch.utils.flop_counter import FlopCounterMode

    net = Net()
    torch.autograd.grad(net.layer(net.layer(source())).sum(), net.log or source(), create_graph=True, allow_unused=True)
    x = source()
    y = net.layer(net.layer(x)).sum()
    torch.autograd.grad(y, x, create_graph=True)
    with FlopCounterMode(display=False):
        net.layer(net.layer(source())).sum().backward()
    net.handover.enabled = False
    net.layer(net.layer(source())).sum().backward()
    assert not any(net.log) and not net.handover.counts


def test_functorch_and_fake_tensors_are_not_served():
    from torch._subclasses.fake_tensor import FakeTensorMode

    handover, served = Handover(), []

    class Ask(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, dy):
            served.append(handover.serves(dy))
            return dy

    ask = lambda x: Ask.apply(x).sum()  # noqa: E731
    torch.func.grad(ask)(torch.randn(3, 2))
    torch.func.vmap(torch.func.grad(ask))(torch.randn(4, 3, 2))
    x = source()
    torch.autograd.grad(ask(x), x, torch.ones(3), is_grads_batched=True)
    with FakeTensorMode():
        fake = ask(source())
    fake.backward()
    ask(source().double() * 1).backward()
    with torch.device("meta"):
        ask(source()).backward()
    assert len(served) >= 6 and not any(served)
    ask(source()).backward()
    assert served[-1]


def test_threads_take_only_their_own():
    """Backward passes of several threads over one hand-over: autograd runs a CPU's nodes on the calling thread."""
    net, failures = Net(Handover(limit=8)), []

    def train():
        try:
            for _ in range(30):
                net.layer(net.layer(net.layer(source()))).sum().backward()
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=train) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures
    counts = net.handover.counts
    assert counts["left"] == 360 and counts["none"] >= 120 and counts["taken"] >= 200


NODES = [
    *[lambda net, a, b: net.layer(a)] * 5,
    lambda net, a, b: a + b,
    lambda net, a, b: a * b,
    lambda net, a, b: a.t(),
    lambda net, a, b: a.reshape(2, 2, 4).transpose(0, 1).reshape(4, 4),
    lambda net, a, b: a.reshape(16).view(4, 4),
    lambda net, a, b: torch.cat([a[:2], b[2:]]),
    lambda net, a, b: a.relu(),
]


def change_by_hook(node, change):
    node.register_hook(lambda g: (CHANGES[change](g) if g.is_contiguous() else None, None)[1])


def test_random_graphs_take_right_or_nothing():
    """Graphs of layers, views, sums, products and hooks: `Layer.backward` tests every hand-over that happens."""
    chance, took = random.Random(0), 0
    for _ in range(150):
        net = Net(Handover(limit=chance.choice([1, 2, 32])))
        nodes = [source(4, 4)]
        for _ in range(chance.randint(3, 12)):
            nodes.append(chance.choice(NODES)(net, chance.choice([nodes[-1], *nodes[-2:]]), chance.choice(nodes[-4:])))
            if chance.random() < 0.2:
                change_by_hook(nodes[-1], chance.choice(["mul_", "part", "detached", "foreach"]))
            if chance.random() < 0.1:
                nodes[-1].register_hook(lambda g: g * 0.5)
        last = nodes[-chance.randint(1, 3) :]
        loss = sum(node.tanh().sum() if chance.random() < 0.3 else node.sum() for node in last)
        for _ in range(chance.randint(1, 2)):
            loss.backward(retain_graph=True)
        took += sum(net.log)
    assert took > 50


# ---- which layers can hand over


def test_a_layer_follows_another_through_views_only():
    build = lambda k, n: fqt.nn.Linear(k, n, recipe="psq8")  # noqa: E731
    a, b = build(8, 6), build(6, 4)
    x = torch.randn(2, 3, 8)
    assert ranges.follows_linear(a(x)) and ranges.follows_linear(b(a(x)).reshape(6, 4))
    assert ranges.follows_linear(a(x).view(6, 6).unflatten(0, (3, 2)).reshape(6, 6))
    for other in (x, x.requires_grad_() * 1, a(x).relu(), a(x) + 1, a(x).detach(), a(x).transpose(0, 1)):
        assert not ranges.follows_linear(other)
