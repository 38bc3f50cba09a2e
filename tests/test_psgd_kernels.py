"""Laws of the optimizer's step in one launch: it is the plain loop's to the last bit, whatever it steps beside it."""

import weakref
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import laws
import pytest
import torch

from fqt import reference
from fqt.optim import loop
from fqt.position import Position, first_threshold
from fqt.recipe import Quantizer
from fqt_kernels import psgd, psgd_table
from fqt_kernels.psgd import Hyper, MultiTensor, Slot

# Of the interpreter's NumPy, where infinities and NaN are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@dataclass
class Group:
    """Hyperparameters, and the target of the parameters of a group."""

    position: Position = field(default_factory=Position)
    lr: float | torch.Tensor = 0.1
    options: dict = field(default_factory=dict)

    def of(self, rule):
        defaults = dict(momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False)
        if rule == "adamw":
            defaults = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        return {key: self.options.get(key, value) for key, value in defaults.items()}

    def hyper(self, rule, device):
        p, options = self.position, self.of(rule)
        lr = self.lr.to(device) if isinstance(self.lr, torch.Tensor) else self.lr
        options["adam_eps"] = options.pop("eps", 0.0)
        target = "points" if callable(p.target) else p.target
        return Hyper(
            lr, **options, maximize=self.options.get("maximize", False), target=target, qmax=p.qmax,
            sparsity=p.sparsity, scale=p.scale, largest=p.largest, eps=p.eps, delta=p.delta, per_channel=p.per_channel,
            position=p.position,
        )  # fmt: skip


class Parameter:
    """A parameter twice: as the kernel steps it, between guard bands, and as the loop does, on the CPU."""

    def __init__(self, memory, w, group=0, codes=None, offset=0):
        """codes: their bits, if they are written.   offset: of all tensors, in elements, from 16-byte boundaries."""
        self.group, self.bits = group, codes
        self._offset, self._memory = offset, memory
        self.w, self.reference, self.state, self.held = self.place(w), w.clone(), {}, {}

    def place(self, x):
        """A copy of x in memory of its own, on the device."""
        if self._offset:
            y = self._memory.empty(x.numel() + self._offset, dtype=x.dtype)[self._offset :].view(x.shape)
        else:
            frame = self._memory.empty(x.numel(), dtype=x.dtype)
            y = torch.as_strided(frame, x.shape, x.stride())
        return y.copy_(x)

    def slot(self, g, group, rule):
        p, held, w, made = group.position, self.held, self.w, {}
        if p.has_range and w.numel():
            rows = len(w) if p.per_channel and w.dim() else 1
            made = dict(range=(rows, 2)) | (dict(threshold=(1,)) if p.target == "grid+zero" else {})
        fresh = {name: name not in held for name in made}
        for name, shape in made.items():
            held.setdefault(name, self._memory.empty(shape))
        if fresh.get("threshold"):
            held["threshold"].copy_(first_threshold(w, p.sparsity))
        new = False
        if rule == "adamw" and not held.get("first", torch.empty(0)).numel():
            held.update(first=self.place(torch.zeros_like(w)), second=self.place(torch.zeros_like(w)))
            held["powers"] = self.place(torch.ones(2, dtype=torch.float64))
        elif rule == "sgd" and group.options.get("momentum"):
            new = "first" not in held
            held.setdefault("first", self.place(torch.full_like(w, float("nan"))))
        if callable(p.target):
            held["points"], held["lam"] = self.place(p.target(w).float()), self._memory.full((1,), lam_of(w.cpu(), p))
        if self.bits and "codes" not in held:
            n, k = len(w), w.numel() // len(w)
            codes = [self._memory.empty(shape, dtype=torch.int8) for shape in ((n, k), (k, n))]
            held["codes"] = (*codes, self._memory.empty((n, 1)))
        flags = dict(fresh=fresh.get("range", False), fresh_threshold=fresh.get("threshold", False), new=new)
        return Slot(w, self.place(g), group=self.group, bits=self.bits or 8, **held, **flags)

    def step(self, g, group, rule, grad_scale):
        """The loop's step of the reference."""
        w, p, options = self.reference, group.position, group.of(rule)
        s = loop.scale_of(w, p, self.state)
        g = loop.gradient(g, w, group.options.get("maximize", False), grad_scale)
        step = loop.sgd_step if rule == "sgd" else loop.adamw_step
        self.reference = step(w, g, self.state, s, lr=group.lr, **options, position=p.position).to(w.dtype)

    def check(self, what):
        laws.assert_same(self.w, self.reference, f"{what}: weights")
        names = dict(range="range", threshold="threshold", powers="powers")
        adamw = "exp_avg" in self.state
        names |= dict(first="exp_avg", second="exp_avg_sq") if adamw else dict(first="momentum_buffer")
        for name in names.keys() & self.held.keys():
            if self.w.numel():
                laws.assert_same(self.held[name], self.state[names[name]], f"{what}: {name}")
        if self.bits:
            x = self.reference.reshape(len(self.reference), -1)
            want = reference.quantize(x, Quantizer(self.bits, "per_row", "symmetric"), cols=True)
            for name, got in zip(("q", "qt", "scale"), self.held["codes"], strict=True):
                laws.assert_same(got, getattr(want, name), f"{what}: {name}")


def lam_of(w, p):
    """λ of a function's points, as the definition has it: of a distance of 1."""
    if p.scale != "auto":
        return p.scale
    distance = (w.float() - p.target(w).float()).abs() + p.eps
    reach = torch.where(distance.isfinite(), distance, 0.0).amax()
    return float(torch.tensor(p.largest) / reach) if reach >= 2.0**-100 else 0.0


@pytest.fixture
def memory(guard, device):
    """Where parameters and what the launchers allocate lie, on the device: nothing outside of it is written."""
    guarded = guard(psgd, psgd_table)
    empty, full = (partial(make, device=device) for make in (guarded.empty, guarded.full))
    return SimpleNamespace(empty=empty, full=full, device=device)


def take_steps(parameters, groups, steps=3, rule="sgd", *, multi=None, found_inf=(), grad_scale=None, before=None):
    """Steps by the kernel and by the loop, compared after each; found_inf: the steps to skip; before(step, slots)."""
    multi, device = multi or MultiTensor(), parameters[0].w.device
    hypers = [group.hyper(rule, device) for group in groups]
    scaler = None if grad_scale is None else torch.tensor([grad_scale], device=device)
    for step in range(steps):
        gradients = [torch.randn(x.w.shape).to(x.w.dtype).contiguous() for x in parameters]
        for x, g in zip(parameters, gradients, strict=True):
            if x.w.numel() > 9:
                g.view(-1)[x.w.numel() // 2] = (float("nan"), float("inf"), 1.0)[step % 3]
        gradients = [torch.empty_like(x.w, device="cpu").copy_(g) for x, g in zip(parameters, gradients, strict=True)]
        slots = [x.slot(g, groups[x.group], rule) for x, g in zip(parameters, gradients, strict=True)]
        if before is not None:
            before(step, slots)
        skipped = torch.tensor([float(step in found_inf)], device=device) if found_inf else None
        multi.step(slots, hypers, rule=rule, found_inf=skipped, grad_scale=scaler)
        torch.autograd.graph.increment_version([slot.w for slot in slots])
        multi.written(slots)
        for i, (x, g) in enumerate(zip(parameters, gradients, strict=True)):
            if step not in found_inf:
                x.step(g, groups[x.group], rule, scaler)
            x.check(f"step {step}, parameter {i} {tuple(x.w.shape)} {x.w.dtype}")
    return multi


def nearest_integers(w):
    """Points in the weights' dtype."""
    return w.round()


MOMENTUM = dict(momentum=0.9, weight_decay=0.01)
GROUPS = [
    Group(Position(), options=MOMENTUM),
    Group(Position("zero", delta="absmax", eps=1e-3), options=dict(momentum=0.8, nesterov=True, maximize=True)),
    Group(Position("grid+zero", bits=3, sparsity=0.5), torch.tensor(0.05), dict(momentum=0.9, dampening=0.5)),
    Group(Position(None), options=MOMENTUM),
    Group(Position("grid", scale=9.0, eps=0.01, position="update"), options=dict(weight_decay=0.1)),
    Group(Position("grid+zero", sparsity=0.7, per_channel=True, scale=3.0), options=MOMENTUM),
    Group(Position(nearest_integers), options=MOMENTUM),
    Group(Position("grid+zero", sparsity=0.01, per_channel=True)),  # a threshold from 0 that the range moves
    Group(Position(lambda w: w.clone())),  # all lie on their points: s = 1
]


def weights(*shape, dtype=torch.float32):
    """Of which some are not finite, exactly 0, or on the range's end."""
    w = 0.3 * torch.randn(shape)
    if w.numel() > 40:
        flat = w.view(-1)
        flat[3], flat[17], flat[21], flat[30:33] = float("nan"), float("-inf"), float("inf"), 0.0
    return w.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sgd_is_the_loops_in_every_group_shape_and_dtype(memory, monkeypatch, dtype):
    monkeypatch.setattr(psgd, "TENSORS", 8)  # whose states are advanced at a time: fewer than there are
    monkeypatch.setattr(psgd, "PIECE", 2048)  # elements: several programs share a tensor
    monkeypatch.setattr(psgd_table, "PIECE", 2048)
    shapes = [(17, 130), (2100,), (17, 16), (64,), (7, 3, 2), (19, 131), (48, 32)]
    parameters = [Parameter(memory, weights(*shape, dtype=dtype), i) for i, shape in enumerate(shapes)]
    more = [((), 0), ((1,), 2), ((0, 5), 0), ((0,), 2), ((2, 300), 5), ((5,), 8)]
    if dtype == torch.float32:
        parameters += [Parameter(memory, weights(*shape, dtype=dtype), group) for shape, group in more]
        parameters += [Parameter(memory, sign * weights(3, 11).abs(), 7) for sign in (1, -1)]
    parameters.append(Parameter(memory, weights(40, 16, dtype=dtype), 2, offset=1))
    image = weights(4, 8, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    parameters += [Parameter(memory, image, 0), Parameter(memory, image, 5)]
    take_steps(parameters, GROUPS, 3 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_is_the_loops(memory, dtype):
    groups = [
        Group(Position(), options=dict(weight_decay=0.01)),
        Group(
            Position("grid+zero", per_channel=True, position="update"),
            torch.tensor(0.01),
            dict(betas=(0.5, 0.9), eps=0.0),
        ),
        Group(Position(None), options=dict(weight_decay=0.1, maximize=True, eps=1e-3)),
    ]
    shapes = [(33, 16), (20, 48), (9,), (6, 131)]
    parameters = [Parameter(memory, weights(*shape, dtype=dtype), i % 3) for i, shape in enumerate(shapes)]
    parameters.append(Parameter(memory, weights(16, 32, dtype=dtype), 1, codes=8))
    take_steps(parameters, groups, 3 if dtype == torch.float32 else 2, "adamw")


def test_codes_are_those_of_the_weights_as_stored(memory):
    """In both layouts, with a row of zeros, of a NaN, of an infinity; several bit widths; beside tensors without."""
    for dtype in (torch.bfloat16, torch.float32):
        shapes = [((24, 144), 8), ((18, 130), 8), ((16, 48), 4), ((1, 20), 8), ((20, 1), 8), ((9,), None)]
        parameters = []
        for i, (shape, bits) in enumerate(shapes):
            w = weights(*shape, dtype=dtype)
            w[len(w) // 2] = 0
            parameters.append(Parameter(memory, w, (0, 5, 3, 4, 6)[i % 5], codes=bits))
        take_steps(parameters, GROUPS, 2)


def test_a_skipped_step_changes_and_advances_nothing(memory):
    groups = [GROUPS[0], GROUPS[2]]
    parameters = [Parameter(memory, weights(20, 16), 0, codes=8), Parameter(memory, weights(9, 5), 1)]
    take_steps(parameters, groups, 5, found_inf=(1, 2), grad_scale=3.0)
    parameters = [Parameter(memory, weights(20, 16), i) for i in (0, 1)]
    take_steps(parameters, groups, 4, "adamw", found_inf=(2,), grad_scale=1024.0)


def test_steps_go_on_after_weights_or_state_were_changed_outside(memory, monkeypatch):
    """The extremes are found anew for what was changed, and for nothing else."""
    parameters = [Parameter(memory, weights(20, 16), i) for i in (0, 2, 5, 3)]
    found = []
    run = MultiTensor._run
    monkeypatch.setattr(MultiTensor, "_run", lambda self, kernel, batch, which, *rest: (
        found.append(len(which)) if kernel is psgd._psgd_stats_kernel else None, run(self, kernel, batch, which, *rest)
    ))  # fmt: skip

    def change(step, slots):
        if step == 2:
            for x in (parameters[0], parameters[2]):
                x.w.mul_(1.5)
                x.reference.mul_(1.5)
        if step == 4:
            parameters[1].held["threshold"].mul_(0.5)
            parameters[1].state["threshold"].mul_(0.5)

    take_steps(parameters, GROUPS, 6, before=change)
    assert found == [3, 2, 1]


def test_a_parameter_without_a_gradient_is_left_alone_and_goes_on_afterwards(memory):
    parameters = [Parameter(memory, weights(20, 16), i) for i in (0, 2)]
    multi = take_steps(parameters, GROUPS, 2)
    kept = parameters[1].w.clone()
    take_steps(parameters[:1], GROUPS, 2, multi=multi)
    laws.assert_same(parameters[1].w, kept)
    take_steps(parameters, GROUPS, 2, multi=multi)


def test_nothing_depends_on_the_order_of_programs(memory, monkeypatch):
    monkeypatch.setattr(psgd, "PIECE", 2048)
    monkeypatch.setattr(psgd_table, "PIECE", 2048)
    monkeypatch.setattr(psgd, "items", lambda sizes: psgd_table.items(sizes).flip(0))
    parameters = [Parameter(memory, weights(50, 80), i) for i in (0, 2, 5)]
    take_steps(parameters, GROUPS, 2)


def test_tables_are_copied_only_when_an_address_or_a_number_changes(memory, monkeypatch):
    copies = []
    table = psgd_table.table
    monkeypatch.setattr(psgd, "table", lambda rows, code: (copies.append(code), table(rows, code))[1])
    x, multi, group = Parameter(memory, weights(16, 16)), MultiTensor(), Group(options=MOMENTUM)
    slot = x.slot(torch.randn(16, 16), group, "sgd")
    g, seen = slot.g, []
    for lr, address in ((0.1, g), (0.1, g), (0.2, g), (0.2, x.place(g)), (0.2, None)):
        address = g if address is None else address
        slot = slot._replace(g=address)
        multi.step([slot], [group.hyper("sgd", memory.device)._replace(lr=lr)], rule="sgd")
        seen.append("".join(copies))
        copies.clear()
        torch.autograd.graph.increment_version(slot.w)
        multi.written([slot])
        slot = slot._replace(fresh=False, new=False)
    assert seen == ["dqq", "q", "d", "q", "q"]  # first, the flags of a first step, lr, an address, its return


def test_only_what_is_aligned_is_read_in_wide_pieces(memory, monkeypatch):
    """Also after a gradient has moved."""
    seen, run = [], MultiTensor._run
    monkeypatch.setattr(
        MultiTensor, "_run", lambda self, *args: (seen.append(args[-1]["ALIGNED"]), run(self, *args))[1]
    )
    x, multi = Parameter(memory, weights(8, 8)), MultiTensor()
    g = memory.empty(65)
    for moved in (g[:64], g[1:], g[:64]):
        multi.step([Slot(x.w, moved.view(8, 8).fill_(1.0))], [Hyper(0.1)], rule="sgd")
        laws.assert_same(x.w, x.reference.sub_(0.1))
    assert seen[0] and not seen[1]
    hyper = Hyper(0.1, target="grid", per_channel=True)
    for shape, codes, aligned in (((3, 8), 0, 1), ((3, 9), 0, 0), ((8, 16), 1, 1), ((8, 24), 1, 0), ((9, 16), 1, 0)):
        w = torch.zeros(shape)
        n, k = shape
        q = torch.zeros(n, k, dtype=torch.int8)
        codes = (q, q.t().contiguous(), torch.zeros(n, 1)) if codes else None
        assert psgd_table.is_aligned(Slot(w, w, codes=codes), hyper) == bool(aligned)
    assert not psgd_table.is_aligned(Slot(torch.zeros(4, 24), torch.zeros(4, 24), range=torch.zeros(4, 2)), hyper)


def test_what_a_graph_reads_is_never_written_again(monkeypatch):
    """Tables of 1, 2, …, all 1, 2, …, in a row of steps, some of them captured."""
    capturing, mirror, seen = [False], psgd_table.Mirror(), []
    monkeypatch.setattr(psgd_table, "is_capturing", lambda device: capturing[0])
    for number, capturing[0] in ((1, False), (1, True), (2, True), (2, False), (3, False), (4, False)):
        seen.append(mirror.update(number, lambda n=number: torch.full((2,), n), torch.device("cpu")))
    assert [int(t[0]) for t in seen] == [1, 1, 2, 4, 4, 4]
    assert seen[0] is seen[1] and len({id(t) for t in seen[1:4]}) == 3


@pytest.mark.interpreted
def test_a_first_step_is_not_captured(monkeypatch):
    monkeypatch.setattr(psgd, "is_capturing", lambda device: True)
    slot = Slot(torch.zeros(3), torch.zeros(3), first=torch.zeros(3))
    with pytest.raises(ValueError, match="a first step cannot be captured"):
        MultiTensor().step([slot._replace(new=True)], [Hyper(0.1, momentum=0.9)], rule="sgd")
    MultiTensor().step([slot], [Hyper(0.1, momentum=0.9)], rule="sgd")


def test_no_gradient_is_kept_alive_and_a_parameter_until_the_next_step_only(device):
    """A weak reference to a parameter would keep torch from swapping it for another."""
    w, other = torch.randn(8, 8).to(device), Slot(torch.randn(8, 8).to(device), torch.randn(8, 8).to(device))
    slot = Slot(w, torch.randn(8, 8).to(device), range=torch.empty(1, 2, device=device), fresh=True)
    multi, g = MultiTensor(), weakref.ref(slot.g)
    multi.step([slot], [Hyper(0.1, target="grid", qmax=7)], rule="sgd")
    multi.written([slot])
    assert not weakref.getweakrefs(w)
    old = weakref.ref(w)
    del slot, w
    assert g() is None
    multi.step([other], [Hyper(0.1)], rule="sgd")
    assert old() is None


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(w=torch.zeros(4, 8, dtype=torch.float64)), "float64"),
        (dict(g=torch.zeros(4, 8, dtype=torch.bfloat16)), "g is of the weights' dtype"),
        (dict(g=torch.zeros(8, 4)), "g is of the weights' dtype, shape"),
        (dict(g=torch.zeros(8, 4).t()), "strides"),
        (dict(w=torch.zeros(4, 16)[:, ::2]), "dense"),
        (dict(first=torch.zeros(8, 4).t()), "strides"),
        (dict(range=torch.zeros(4, 2)), r"range is torch.float32 \(1, 2\)"),
        (dict(threshold=torch.zeros(2)), "threshold is"),
        (dict(codes=(torch.zeros(4, 8), torch.zeros(8, 4), torch.zeros(4, 1))), "q is torch.int8"),
    ],
)
def test_what_cannot_be_stepped_is_refused_by_name(change, message):
    slot = Slot(torch.zeros(4, 8), torch.zeros(4, 8), range=torch.zeros(1, 2))
    plain = Slot(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=f"slot 1, .*{message}"):
        MultiTensor().step([plain, slot._replace(**change)], [Hyper(0.1, target="grid", qmax=7)], rule="sgd")


def test_rows_of_their_own_have_to_be_pieces_of_memory():
    w = torch.zeros(8, 4).t()
    slot = Slot(w, w, range=torch.zeros(4, 2))
    hyper = Hyper(0.1, target="grid", qmax=7, per_channel=True)
    assert "one after the other" in psgd.unsupported(slot, hyper)
    assert psgd.unsupported(slot._replace(range=torch.zeros(1, 2)), hyper._replace(per_channel=False)) is None
    image = torch.zeros(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    slot = Slot(image, image, range=torch.zeros(4, 2))
    assert psgd.unsupported(slot, hyper) is None
    assert "are contiguous" in psgd.unsupported(slot._replace(codes=(w, w, w)), hyper)


def test_the_rule_and_its_moments_are_checked():
    slot = Slot(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="rule must be sgd or adamw, got 'adam'"):
        MultiTensor().step([slot], [Hyper(0.1)], rule="adam")
    with pytest.raises(ValueError, match=r"slot 0, .*adamw with target None needs first, second, powers"):
        MultiTensor().step([slot], [Hyper(0.1)], rule="adamw")
    with pytest.raises(ValueError, match="sgd with target None needs first"):
        MultiTensor().step([slot], [Hyper(0.1, momentum=0.9)], rule="sgd")
    both = Hyper(0.1, target="grid+zero", qmax=7)
    with pytest.raises(ValueError, match="needs threshold"):
        MultiTensor().step([slot._replace(range=torch.zeros(1, 2))], [both], rule="sgd")
    with pytest.raises(ValueError, match="needs lam"):
        MultiTensor().step([slot._replace(points=torch.zeros(3))], [both._replace(target="points")], rule="sgd")
