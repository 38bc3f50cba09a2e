"""The transformer of the studies, and the text that it is trained on."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fqt
from fqt.cli import UsageError
from fqt_bench import psgd_runs, sources
from fqt_bench.gpt import GPT, Block


def tokens(n=2, t=9, seed=0):
    return torch.randint(256, (n, t), generator=torch.Generator().manual_seed(seed))


def test_a_block_is_attention_and_a_feed_forward_network_added_to_the_input():
    """By the formulas, one head at a time, in float64."""
    torch.manual_seed(0)
    block, x = Block(8, 2).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    q, k, v = block.qkv(block.norm1(x)).split(8, -1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / math.sqrt(4)
        later = torch.ones(5, 5, dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[..., h])
    y = x + block.proj(torch.cat(heads, -1))
    expected = y + block.fc2(F.gelu(block.fc1(block.norm2(y))))
    torch.testing.assert_close(block(x), expected)


def test_no_byte_sees_a_later_one():
    torch.manual_seed(0)
    model, x = GPT(2, 16).double(), tokens()
    other = x.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 256
    a, b = model(x), model(other)
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a[:, 5], b[:, 5])


def test_a_byte_knows_its_place():
    torch.manual_seed(0)
    logits = GPT(1, 16)(torch.full((1, 4), 7))
    assert len({tuple(row) for row in logits[0].tolist()}) == 4


def test_every_product_with_weights_is_converted():
    model = GPT(2, 16)
    report = fqt.quantize_(model, "psq5")
    assert len(report.converted) == 2 * 4 + 1 and not report.skipped
    assert not [m for m in model.modules() if type(m) is nn.Linear]


def test_at_the_start_all_bytes_are_about_as_likely():
    """The loss is ln 256 = 5.55 and what logits of the initial weights add, half their variance."""
    torch.manual_seed(0)
    model, x = GPT(2, 64), tokens(8, 64)
    with torch.no_grad():
        extra = model(x).var(-1).mean().item() / 2
        loss = psgd_runs.loss_of(model, x, tokens(8, 64, seed=1)).item()
    assert extra < 0.5 and loss == pytest.approx(math.log(256) + extra, abs=0.1)


def test_impossible_sizes_are_errors():
    with pytest.raises(ValueError, match="multiple of 4 heads, got 18"):
        GPT(1, 18)
    with pytest.raises(ValueError, match="9 tokens, but the network's context is 8"):
        GPT(1, 8, context=8)(tokens())


# ---- the text


@pytest.fixture
def library(tmp_path):
    """Twelve modules of 100 equal bytes, "a" to "l", and what is no module of the library."""
    for i in range(12):
        folder = tmp_path / ("package" if i % 2 else ".")
        folder.mkdir(exist_ok=True)
        (folder / f"m{i:02}.py").write_bytes(bytes([ord("a") + i]) * 100)
    for name in ("test/m.py", "package/tests/m.py", "site-packages/m.py", "_sysconfigdata_x.py", "m.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?" * 1000)
    return tmp_path


def test_windows_reach_from_the_first_byte_to_the_last_and_keep_their_order(library):
    paths = sources.files(library)
    made = sources.windows(paths, 7, context=9)
    assert made.shape == (7, 10) and made.dtype == torch.int64
    text = b"".join(path.read_bytes() for path in paths)
    assert bytes(made[0].tolist()) == text[:10] and bytes(made[-1].tolist()) == text[-10:]
    assert all(bytes(row.tolist()) in text for row in made)
    assert "?" not in text.decode() and len(text) == 1200


def test_what_is_tested_is_not_trained_on(library):
    train, test = sources.load(library, train=15, test=3)
    assert (len(train), len(test)) == (15, 3)
    assert not set(train.unique().tolist()) & set(test.unique().tolist())
    assert len(set(test.unique().tolist())) == 2  # each tenth of twelve files


def test_too_little_text_is_an_error_that_says_how_much_there_is(library, tmp_path):
    with pytest.raises(UsageError, match=r"10 sources of 1000 bytes: 16 windows of 65 bytes need more"):
        sources.load(library, train=16, test=3)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="0 sources"):
        sources.load(empty)


def test_the_library_of_this_python_is_enough():
    """And what is said of each byte is the byte after it."""
    data = psgd_runs.load("python")
    assert data.train_x.shape == (sources.TRAIN, sources.CONTEXT) and data.test_y.shape == (
        sources.TEST,
        sources.CONTEXT,
    )
    assert torch.equal(data.train_x[:, 1:], data.train_y[:, :-1]) and torch.equal(
        data.test_x[:, 1:], data.test_y[:, :-1]
    )
    assert not torch.equal(data.train_x[:, -1], data.train_y[:, -1])


# ---- what is said of a network


def test_accuracy_and_loss_are_of_all_bytes():
    torch.manual_seed(0)
    model, x, y = GPT(1, 8).double(), tokens(1003, 4), tokens(1003, 4, seed=1)
    data = psgd_runs.Data("noise", x, y, x, y)
    accuracy, loss = psgd_runs.evaluated(model, data)
    with torch.no_grad():
        logp = model(x).log_softmax(-1)
    assert accuracy == pytest.approx(100 * (logp.argmax(-1) == y).double().mean().item())
    assert loss == pytest.approx(-logp.gather(-1, y[..., None]).mean().item())
    assert loss == pytest.approx(psgd_runs.loss_of(model, x, y).item())


def test_a_curve_is_the_mean_of_equal_parts_of_the_steps():
    losses = torch.arange(200.0)
    assert [float(v) for v in psgd_runs.curve(losses).split()] == [1.5 + 4 * i for i in range(psgd_runs.POINTS)]
    assert psgd_runs.curve(torch.tensor([3.0, 1.0])) == "3 1" and psgd_runs.at_the_end(losses) == 149.5


def test_only_the_weights_of_layers_decay_under_adam():
    torch.manual_seed(0)
    method = psgd_runs.Method("fp", (), {"target": "grid", "bits": 4})
    for optimizer in (psgd_runs.plain(GPT(1, 8), "gpt"), psgd_runs.optimizer_of(GPT(1, 8), method, "gpt")):
        weights, others = optimizer.param_groups
        assert (weights["weight_decay"], others["weight_decay"]) == (psgd_runs.ADAM_WEIGHT_DECAY, 0.0)
        assert [p.dim() for p in weights["params"]] == [2] * 5
    assert weights["position"] == "update" and others["target"] is None  # of the one with a target
