"""Tables of measured kernels are plain data: buckets, keys, neighbours, and the validation of whatever JSON there is."""

import doctest
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqt import candidates, recipe, tuned
from fqt.dispatch import Problem
from fqt.tuned import EMPTY, Entry, Key, Table, Timing, bucket, from_json, key, to_json

CONFIG = (128, 128, 128, 8, 3)
PORTABLE, CUBLAS = Timing("portable", CONFIG, 1, 2000), Timing("cublas", (), 1, 3000)
GPU = dict(device="cuda", arch="sm90", processors=132, triton="3.6.0")
SIZES = st.integers(1, 1 << 20)


def entry(m=4096, n=4096, k=4096, op="scaled_mm", ranking=(PORTABLE, CUBLAS), **problem) -> Entry:
    return Entry(key(Problem(op, m, n, k, **GPU, **problem)), ranking, 4000, (m, n, k))


def test_the_examples_of_the_docstring_hold():
    assert doctest.testmod(tuned).failed == 0


@given(SIZES, SIZES)
def test_a_bucket_is_at_or_little_above_the_size_and_never_below_a_smaller_size_s(a, b):
    assert a <= bucket(a) == bucket(bucket(a))
    assert bucket(a) <= max(16, 1.25 * a)  # the coarsest step is from a half to five eighths of an octave
    assert bucket(min(a, b)) <= bucket(max(a, b))


def test_there_are_four_buckets_an_octave_and_zero_has_one_of_its_own():
    assert bucket(0) == 0 and {bucket(size) for size in range(1, 17)} == {16}
    for low in (16, 64, 4096, 1 << 40):
        assert [bucket(low + i * low // 4 + 1) for i in range(4)] == [low + i * low // 4 for i in (1, 2, 3, 4)]


def test_token_counts_that_jitter_share_a_key_and_what_speed_depends_on_does_not():
    problem = Problem("scaled_mm", 8192, 4096, 4096, **GPU)
    same = [dict(m=8100), dict(m=7169), dict(dtype="bfloat16"), dict(plain=False), dict(deterministic=True)]
    other = [dict(m=7168), dict(n=4095), dict(k=4090), dict(format="e4m3"), dict(op="quantize")]
    for change in same:
        assert key(Problem(**vars(problem) | change)) == key(problem), change
    for change in other:
        assert key(Problem(**vars(problem) | change)) != key(problem), change
    rows = Problem("quantize", 8192, 4096, dtype="bfloat16", kind="per_row nearest rows", **GPU)
    assert key(rows) == Key("quantize", "int", "bfloat16", "per_row nearest rows", 1, 8192, 4096, 0)
    assert key(rows) != key(Problem(**vars(rows) | dict(dtype="float32")))
    assert key(rows) != key(Problem(**vars(rows) | dict(kind="per_row nearest both")))


def test_an_entry_survives_json_and_equal_contents_have_equal_digests():
    rows = Timing("rows", (), 1, 5)
    both = [entry(), entry(100, 200, 300, ranking=(CUBLAS,)),
            entry(64, 128, 0, "quantize", (rows,), kind="per_row nearest rows", dtype="bfloat16")]  # fmt: skip
    table = Table(both)
    again, refused = from_json(json.loads(json.dumps(table.to_json())))
    assert refused == {} and set(again) == set(both) and len(again) == 3
    assert again.digest == table.digest == Table(reversed(both)).digest != EMPTY.digest
    assert Table([entry(ranking=(CUBLAS,))]).digest != Table([entry()]).digest
    shipped, _ = from_json(table.to_json(), "shipped")
    assert shipped.digest == table.digest and {e.origin for e in shipped} == {"shipped"}


def test_tables_are_immutable_and_equal_only_to_themselves():
    a, b = Table([entry()]), Table([entry()])
    assert a != b and a == a and len({a, b}) == 2
    assert a.merged(EMPTY) is not a and len(EMPTY) == 0


def test_merging_takes_the_other_s_entry_of_a_key_that_both_have():
    mine, theirs, more = entry(), entry(4090, 4096, 4096, ranking=(CUBLAS,)), entry(64, 64, 64)
    merged = Table([mine]).merged(Table([theirs, more]))
    problem = Problem("scaled_mm", 4096, 4096, 4096, **GPU)
    assert len(merged) == 2 and merged.exact(problem) is theirs
    assert Table([theirs, more]).merged(Table([mine])).exact(problem) is mine
    assert merged.exact(Problem("scaled_mm", 8192, 4096, 4096, **GPU)) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(1, 1024)] * 3), max_size=12), st.tuples(*[st.integers(1, 1024)] * 3), st.randoms()
)
def test_nearest_gives_exactly_the_neighbours_within_a_factor_of_two_nearest_first(sizes, wanted, random):
    entries = [entry(*size) for size in sizes] + [entry(*size, format="e4m3") for size in sizes]
    table = Table(entries)
    problem = Problem("scaled_mm", *wanted, **GPU)
    goal, found = key(problem), table.nearest(problem)

    def distance(other: Key) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(goal[5:], other[5:], strict=True))

    def within(other: Key) -> bool:
        return goal[:5] == other[:5] and all(
            max(a, b) <= 2 * min(a, b) for a, b in zip(goal[5:], other[5:], strict=True)
        )

    assert {e.key for e in found} == {e.key for e in table if within(e.key)}
    assert all(distance(a.key) <= distance(b.key) + 1e-9 for a, b in itertools.pairwise(found))
    random.shuffle(entries)
    assert [e.key for e in Table(entries).nearest(problem)] == [e.key for e in found]  # ranks agree on ties
    if (exact := table.exact(problem)) is not None:
        assert found[0] is exact


def test_of_equally_near_neighbours_the_smaller_key_is_first_on_every_machine():
    equal = [entry(2048, 4096, 4096), entry(4096, 2048, 4096), entry(4096, 4096, 8192), entry(8192, 4096, 4096)]
    problem = Problem("scaled_mm", 4096, 4096, 4096, **GPU)
    for order in itertools.permutations(equal):
        assert Table(order).nearest(problem) == tuple(equal)


def test_a_bucket_has_the_same_neighbours_for_all_its_sizes():
    table = Table([entry(m, 4096, 4096) for m in (2048, 4096, 5120, 8192, 16384)])
    answers = [[e.key.m for e in table.nearest(Problem("scaled_mm", m, 4096, 4096, **GPU))] for m in (4097, 4500, 5120)]
    assert answers == [[5120, 4096, 8192]] * 3


def test_the_words_of_a_kind_are_those_of_recipes_and_of_dispatch():
    layouts, more = ("rows", "cols", "both"), ("strided", "stats")
    assert tuned.WORDS == (*recipe.GRANULARITIES, *recipe.ROUNDINGS, *layouts, *more)
    for word in (*layouts, *more):
        assert f'"{word}"' in Problem.__doc__, word


def changed(path: str, value) -> dict:
    """An entry's JSON with one field at a dotted path replaced; None deletes it."""
    found = to_json(entry())
    *parents, last = path.split(".")
    place = found
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    if value is None:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return found


INTEGER, RANGE, LENGTH = "a non-integer where an integer belongs", "a number out of range", "a list of a wrong length"


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "not an object"),
        ([], "not an object"),
        (changed("ir_override", "/tmp/evil.ttir"), "an unknown field"),
        (changed("ranking.0.ir_override", 1), "an unknown field"),
        (changed("ranking.0.num_ctas", 1), "an unknown field"),
        (changed("bf16_ns", None), "a missing field"),
        (changed("ranking.0.split_k", None), "a missing field"),
        (changed("op", "attention"), "an unknown word"),
        (changed("op", 1), "an unknown word"),
        (changed("op", ["scaled_mm"]), "an unknown word"),
        (changed("format", "fp4"), "an unknown word"),
        (changed("dtype", "float32"), "an unknown word"),
        (changed("kind", "per_row"), "an unknown word"),
        (changed("op", "quantize"), "an unknown word"),  # without the dtype of what is quantized
        (changed("kind", 3), "an unknown word"),
        (changed("bf16_ns", 1.0), INTEGER),
        (changed("bf16_ns", True), INTEGER),
        (changed("bf16_ns", "1"), INTEGER),
        (changed("bf16_ns", -1), RANGE),
        (changed("bf16_ns", 1 << 60), RANGE),
        (changed("exact", [1, 2]), LENGTH),
        (changed("exact", {"m": 1}), "no list where one belongs"),
        (changed("exact.0", -1), RANGE),
        (changed("exact.0", 1 << 60), RANGE),
        (changed("ranking", []), LENGTH),
        (changed("ranking", [to_json(entry())["ranking"][0]] * 9), LENGTH),
        (changed("ranking", "portable"), "no list where one belongs"),
        (changed("ranking.0", 3), "not an object"),
        (changed("ranking.1", to_json(entry())["ranking"][0] | {"ns": 1}), "a candidate twice"),
        (changed("ranking.0.kernel", "__import__('os').system('true')"), "an unknown kernel"),
        (changed("ranking.0.kernel", "flash"), "an unknown kernel"),
        (changed("ranking.0.kernel", 7), "an unknown kernel"),
        (changed("ranking.0.config", [128] * 9), LENGTH),
        (changed("ranking.0.config", "128"), "no list where one belongs"),
        (changed("ranking.0.config.0", 0), RANGE),
        (changed("ranking.0.config.0", 1 << 20), RANGE),
        (changed("ranking.0.config.0", 128.0), INTEGER),
        (changed("ranking.0.config.0", False), INTEGER),
        (changed("ranking.0.config.0", 129), "a configuration that the code does not have"),
        (changed("ranking.1.config", list(CONFIG)), "a configuration that the code does not have"),
        (changed("ranking.0.kernel", "rows"), "a configuration that the code does not have"),
        (changed("ranking.0.split_k", 0), RANGE),
        (changed("ranking.0.ns", -5), RANGE),
        (changed("ranking.0.ns", 5.5), INTEGER),
    ],
)
def test_an_entry_that_tuning_could_not_have_written_is_refused_and_counted_and_its_neighbours_stay(item, reason):
    table, refused = from_json([item, to_json(entry(64, 64, 64)), item])
    assert refused == {reason: 2}
    assert [e.exact for e in table] == [(64, 64, 64)]


@pytest.mark.parametrize("obj", [None, {}, "[]", 3, {"entries": []}])
def test_what_is_no_list_is_one_refusal(obj):
    assert from_json(obj) == (EMPTY, {"no list of entries": 1})


def test_an_entry_of_other_kernels_may_name_what_this_code_lacks_but_stays_of_the_same_form():
    item = changed("ranking.0.kernel", "flash")
    assert tuned.entry_from_json(item, present=False).ranking[0].kernel == "flash"
    for name in ("a b", "x" * 33, "os.system", 7):
        with pytest.raises(tuned.Refused, match="unknown kernel"):
            tuned.entry_from_json(changed("ranking.0.kernel", name), present=False)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ODD = ANY_JSON | st.sampled_from(
    ["scaled_mm", "quantize", "e4m3", "bfloat16", "per_row nearest", "portable", "rows", 0, 1]
)


@st.composite
def nearly_entries(draw):
    """A valid entry's JSON in which some values, at any depth, are replaced or deleted."""
    item = to_json(entry())
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from([item, *(t for t in item.get("ranking", ()) if isinstance(t, dict))]
                                     if isinstance(item.get("ranking"), list) else [item]))  # fmt: skip
        name = draw(st.sampled_from([*place, "ir_override"]))
        if draw(st.booleans()):
            place.pop(name, None)
        else:
            place[name] = draw(ODD)
    return item


@settings(max_examples=300, deadline=None)
@given(ANY_JSON | st.lists(nearly_entries() | ANY_JSON, max_size=4))
def test_whatever_the_json_reading_never_raises_and_every_entry_it_lets_in_is_valid(obj):
    table, refused = from_json(obj)
    assert isinstance(obj, list) or (len(table) == 0 and refused == {"no list of entries": 1})
    if isinstance(obj, list):
        assert len(table) + sum(refused.values()) <= len(obj) and (len(table) > 0 or sum(refused.values()) == len(obj))
    for e in table:
        assert (
            e.key.op in tuned.OPS and e.key.format in tuned.FORMATS and (e.key.dtype == "") == (e.key.op == "scaled_mm")
        )
        assert e.key == Key(*e.key[:4], int(e.exact[1] % 16 == e.exact[2] % 16 == 0), *map(bucket, e.exact))
        assert 1 <= len(e.ranking) <= 8
        for timing in e.ranking:
            assert candidates.known(e.key.op, e.key.format, timing.kernel, timing.config)
            assert all(type(value) is int for value in (*timing.config, timing.split_k, timing.ns, e.bf16_ns, *e.exact))
    assert from_json(table.to_json())[0].digest == table.digest
