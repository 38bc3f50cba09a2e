"""The figures of samples: percentiles, and ratios whose intervals cover what they should."""

import math
import random
import statistics

import pytest

from fqt_bench.stats import percentile, speed_ups


@pytest.mark.parametrize("n", [2, 3, 10, 11, 100])
def test_percentiles_are_those_of_the_standard_library(n):
    values = [float((7 * i) % n) for i in range(n)]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    got = [percentile(values, p) for p in (10, 50, 90)]
    assert got == pytest.approx([deciles[0], deciles[4], deciles[8]], rel=1e-12)
    assert percentile([5.0], 90) == 5.0


def test_a_ratio_is_of_the_medians_and_above_one_is_faster():
    got = speed_ups(
        [2.0, 4.0, 6.0], {"base": [2.0, 4.0, 6.0], "twice as fast": [1.0, 2.0, 3.0], "other": [3.0, 9.0, 2.0]}
    )
    assert got["base"] == (1.0, 1.0, 1.0)
    assert got["twice as fast"] == (2.0, 2.0, 2.0)  # in every round, so that drawing whole rounds leaves no doubt
    assert got["other"].value == 4 / 3 and got["other"].low < 4 / 3 < got["other"].high


def test_the_same_samples_give_the_same_interval_and_another_seed_another():
    draw = random.Random(3)
    base, other = ([draw.lognormvariate(0, 0.2) for _ in range(20)] for _ in range(2))
    assert speed_ups(base, {"x": other}) == speed_ups(base, {"x": other})
    assert speed_ups(base, {"x": other}, seed=1) != speed_ups(base, {"x": other})


@pytest.mark.parametrize(("base", "other"), [([], []), ([1.0], []), ([1.0, 2.0], [1.0])])
def test_rounds_that_do_not_match_are_refused(base, other):
    with pytest.raises(ValueError, match="as many samples as rounds"):
        speed_ups(base, {"x": other})


def _covered(trials, rounds, drift, noise, resamples=150):
    """How often the interval holds the true ratio 1.3. Rounds share a drift; each side has noise of its own."""
    draw = random.Random(2010)
    hits = 0
    for trial in range(trials):
        shared = [math.exp(drift * draw.gauss(0, 1)) for _ in range(rounds)]
        base = [1.3 * s * math.exp(noise * draw.gauss(0, 1)) for s in shared]
        other = [s * math.exp(noise * draw.gauss(0, 1)) for s in shared]
        ratio = speed_ups(base, {"x": other}, resamples, seed=trial)["x"]
        hits += ratio.low <= 1.3 <= ratio.high
    return hits / trials


def test_the_interval_covers_the_true_ratio_19_times_of_20():
    """Of 300 trials at 95 %: binomial, σ = 1.26 %, so 90.9 to 99.1 % at ±3.3 σ. Of 30 rounds; skewed noise of 10 %."""
    assert 0.909 <= _covered(300, 30, drift=0.0, noise=0.1) <= 0.991


def test_what_slows_a_whole_round_is_no_doubt_about_the_ratio():
    """The same samples with the rounds of one side shuffled: their drift of 30 % is then noise of the ratio."""
    draw = random.Random(5)
    shared = [math.exp(0.3 * draw.gauss(0, 1)) for _ in range(60)]
    base, other = ([s * math.exp(0.02 * draw.gauss(0, 1)) for s in shared] for _ in range(2))
    together = speed_ups(base, {"x": other})["x"]
    apart = speed_ups(base, {"x": draw.sample(other, 60)})["x"]
    assert (together.high - together.low) < (apart.high - apart.low) / 2
