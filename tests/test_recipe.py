"""Laws of recipes: names, JSON, equality, and which combinations an integer matrix product can compute."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest

from fqt.recipe import GRANULARITIES, ROUNDINGS, ZEROS, Quantizer, Recipe

NAMES = ["exact", "qat8", "int8"] + [f"{kind}{bits}" for kind in ("ptq", "psq", "bhq") for bits in range(2, 9)]
GRID = Quantizer(8, "per_tensor", "grid")
ROW = Quantizer(8, "per_row")
COLUMN = Quantizer(8, "per_column")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_its_recipe_determine_each_other(name):
    recipe = Recipe.parse(name)
    assert recipe.name == str(recipe) == name
    assert Recipe.parse(recipe) is recipe
    assert Recipe.parse(recipe.to_json()) == recipe


def test_names_are_of_different_recipes():
    assert len({Recipe.parse(name) for name in NAMES}) == len(NAMES)


def test_bits_may_be_written_after_a_dash():
    for kind in ("ptq", "psq", "bhq"):
        for bits in range(2, 9):
            assert Recipe.parse(f"{kind}-{bits}") == Recipe.parse(f"{kind}{bits}") == getattr(Recipe, kind)(bits)
    assert Recipe.parse("qat-8") == Recipe.parse("qat8") == Recipe.qat(8)


@pytest.mark.parametrize(
    "spec", ["", "psq", "psq9", "psq1", "psq-05", "psq--5", "PSQ5", "int-8", "bhq 4", "qat", "fp16"]
)
def test_an_unknown_name_lists_the_valid_ones(spec):
    with pytest.raises(ValueError) as e:
        Recipe.parse(spec)
    assert repr(spec) in str(e.value)
    for valid in ("exact", "qat8", "int8", "ptq2", "psq8", "bhq8", "ptq-4"):
        assert valid in str(e.value)


@pytest.mark.parametrize("spec", [None, 8, b"psq5", ["psq5"], Quantizer()])
def test_a_recipe_is_a_name_or_a_recipe(spec):
    with pytest.raises(TypeError, match=type(spec).__name__):
        Recipe.parse(spec)


def test_the_paper_recipes_quantize_what_the_paper_says():
    """X and W 8-bit nearest per tensor, dY of wgrad 8-bit stochastic per tensor, bits only of the dY of dgrad."""
    weight_gradient = Quantizer(8, "per_tensor", "grid", "stochastic")
    dgrad = {
        "ptq": Quantizer(5, "per_tensor", "grid", "stochastic"),
        "psq": Quantizer(5, "per_row", "min", "stochastic"),
        "bhq": Quantizer(5, "per_row", "min", "stochastic", householder=True),
    }
    for kind, quantizer in dgrad.items():
        assert Recipe.parse(f"{kind}5") == Recipe(GRID, GRID, quantizer, weight_gradient)
    assert Recipe.ptq(5, zero="min").dgrad == Quantizer(5, "per_tensor", "min", "stochastic")
    assert Recipe.qat(4) == Recipe(*[Quantizer(4, "per_tensor", "grid")] * 2)


def test_int8_is_symmetric_throughout_and_scales_what_each_product_does_not_contract():
    r = Recipe.int8()
    assert (r.x.granularity, r.w.granularity, r.dgrad.granularity, r.wgrad.granularity) == ("per_row",) * 3 + (
        "per_column",
    )
    assert {q.zero for q in (r.x, r.w, r.dgrad, r.wgrad)} == {"symmetric"} and not r.affine
    assert (r.x.rounding, r.w.rounding, r.dgrad.rounding, r.wgrad.rounding) == ("nearest",) * 2 + ("stochastic",) * 2


def test_a_recipe_is_affine_if_any_operand_has_an_offset():
    assert not Recipe.exact().affine
    assert not Recipe(ROW, ROW).affine
    assert Recipe(GRID, ROW).affine and Recipe(ROW, GRID).affine
    assert Recipe(ROW, ROW, dgrad=Quantizer(8, "per_row", "min")).affine
    assert Recipe(ROW, ROW, wgrad=Quantizer(8, "per_column", "grid")).affine


@pytest.mark.parametrize("name", ["exact", "int8", "psq3", "bhq4"])
def test_json_survives_a_round_trip(name):
    recipe = Recipe.parse(name)
    text = recipe.to_json()
    assert Recipe.from_json(text) == Recipe.parse(" " + text) == recipe
    assert Recipe.from_json(text).to_json() == text


def test_a_recipe_without_a_name_prints_as_json_that_parses():
    recipe = Recipe.ptq(5, zero="min")
    assert recipe.name == "custom" and Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '"psq5"', "3", "null", '{"x":5}', '{"x":"psq5"}', '{"x":{"bits":8},"y":null}',
        '{"x":{"bits":9},"w":{"bits":8},"dgrad":null,"wgrad":null}',
        '{"x":{"bit":8},"w":{"bits":8},"dgrad":null,"wgrad":null}',
        '{"x":{"bits":8},"w":null,"dgrad":null,"wgrad":null}',
    ],
)  # fmt: skip
def test_a_text_that_is_no_recipe_raises_value_error(text):
    with pytest.raises(ValueError):
        Recipe.from_json(text)


@pytest.mark.parametrize("text", ["{}", '{"x":null}', '{"x":{"bits":8},"w":{"bits":8}}'])
def test_json_with_a_missing_field_raises_value_error(text):
    """As `from_json` promises: a truncated checkpoint must not become a recipe of full precision."""
    with pytest.raises(ValueError):
        Recipe.from_json(text)


def test_equal_recipes_are_equal_and_hash_alike():
    for name in NAMES:
        fresh = Recipe.from_json(Recipe.parse(name).to_json())
        for twin in (fresh, copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh)), dataclasses.replace(fresh)):
            assert twin == fresh and hash(twin) == hash(fresh) and twin.name == name
    assert Recipe.psq(5) != Recipe.psq(4) and Recipe.psq(5) != Recipe.bhq(5)


@pytest.mark.parametrize("record, field", [(Recipe.int8(), "x"), (Quantizer(), "bits")])
def test_recipes_are_frozen(record, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, field, None)


@pytest.mark.parametrize("name", NAMES)
def test_as_qat_keeps_the_forward_pass_and_drops_gradient_quantization(name):
    recipe = Recipe.parse(name)
    qat = recipe.as_qat()
    assert (qat.x, qat.w, qat.dgrad, qat.wgrad) == (recipe.x, recipe.w, None, None)
    assert qat.as_qat() == qat and qat.is_exact == recipe.is_exact == (name == "exact")


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1}, {"bits": 9}, {"bits": 0}, {"bits": -8}, {"bits": 8.0}, {"bits": True}, {"bits": "8"}, {"bits": None},
        {"granularity": "per_group"}, {"granularity": None}, {"zero": "asymmetric"}, {"zero": ""},
        {"rounding": "stochastically"}, {"rounding": "Nearest"},
        {"householder": True}, {"householder": True, "granularity": "per_column"},
    ],
)  # fmt: skip
def test_a_quantizer_out_of_range_raises_and_names_the_value(fields):
    with pytest.raises(ValueError) as e:
        Quantizer(**fields)
    value = fields.get("granularity", "per_tensor") if "householder" in fields else next(iter(fields.values()))
    assert repr(value) in str(e.value)


def test_every_quantizer_in_range_exists():
    for granularity in GRANULARITIES:
        for zero in ZEROS:
            for rounding in ROUNDINGS:
                for bits in range(2, 9):
                    q = Quantizer(bits, granularity, zero, rounding)
                    assert (q.bits, q.granularity, q.zero, q.rounding, q.householder) == (
                        bits, granularity, zero, rounding, False
                    )  # fmt: skip
    assert Quantizer(granularity="per_row", householder=True).householder


@pytest.mark.parametrize(
    "operands",
    [
        {"x": GRID}, {"w": GRID}, {"dgrad": GRID}, {"wgrad": GRID}, {"x": GRID, "dgrad": GRID},
        {"x": COLUMN, "w": GRID}, {"x": GRID, "w": COLUMN},
        {"x": Quantizer(8, "per_row", "min"), "w": GRID}, {"x": GRID, "w": Quantizer(8, "per_row", "grid")},
        {"x": Quantizer(rounding="stochastic"), "w": GRID}, {"x": GRID, "w": Quantizer(rounding="stochastic")},
        {"x": Quantizer(8, "per_row", householder=True), "w": GRID},
        {"x": GRID, "w": Quantizer(8, "per_row", householder=True)},
        {"x": GRID, "w": GRID, "dgrad": COLUMN}, {"x": GRID, "w": GRID, "wgrad": ROW},
        {"x": GRID, "w": GRID, "wgrad": Quantizer(8, "per_row", householder=True)},
    ],
)  # fmt: skip
def test_a_combination_that_no_integer_product_computes_raises(operands):
    with pytest.raises(ValueError):
        Recipe(**operands)


def test_every_other_combination_exists():
    forward = [GRID, Quantizer(4, "per_tensor", "min"), Quantizer(), ROW]
    dgrad = [
        None,
        GRID,
        Quantizer(3, "per_row", "grid", "stochastic"),
        Quantizer(8, "per_row", "min", householder=True),
    ]
    wgrad = [None, GRID, Quantizer(3, "per_column", "min", "stochastic")]
    made = {Recipe(x, w, g, h) for x in forward for w in forward for g in dgrad for h in wgrad}
    assert len(made) == len(forward) ** 2 * len(dgrad) * len(wgrad)


def test_importing_recipes_imports_neither_torch_nor_triton():
    code = (
        "import sys, fqt, fqt.recipe; fqt.Recipe.parse('psq5'); print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"


def test_auto_and_tiles_have_names():
    assert Recipe.parse("auto") == Recipe.parse("auto-8") == Recipe.auto(8) and Recipe.auto(8).dgrad.auto
    assert Recipe.parse("bhq-5-tile") == Recipe.bhq(5, groups="tile") != Recipe.bhq(5)
    assert Recipe.auto(3, "tile").name == "auto3-tile" and Recipe.from_json(Recipe.auto(3).to_json()) == Recipe.auto(3)


@pytest.mark.parametrize("fields", [{"groups": "tile"}, {"auto": True}, {"groups": "warp"}, {"range": "guess"}])
def test_fields_of_the_transform_need_it_and_have_few_values(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Quantizer(8, "per_row", **fields)
