"""Suites: the shapes are those of the networks, and each layer poses the problems of its three products."""

import pytest

from fqt import suites, tuned
from fqt.collect import Target
from fqt.suites import SUITES, Layer

H100 = Target("sm90", 132)
RESNET50_BLOCKS = (3, 4, 6, 3)


def test_names_are_unique_and_extents_positive():
    for name, layers in SUITES.items():
        assert len({layer.name for layer in layers}) == len(layers), name
        assert all(min(layer.m, layer.n, layer.k) >= 1 for layer in layers)


def test_the_suites_of_the_command_line_are_those_there_are():
    from fqt.cli_tune import DTYPES
    from fqt.cli_tune import SUITES as names

    assert names == (*SUITES, *suites.CONVOLUTION_SUITES) and set(DTYPES) == set(tuned.DTYPES)


def test_llama_8b_has_its_four_layers_at_three_numbers_of_tokens():
    shapes = {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)}
    assert {layer[1:] for layer in SUITES["llama-8b"]} == {(m, n, k) for m in (4096, 8192, 16384) for n, k in shapes}


def test_resnet50_multiplies_as_often_as_resnet50_does():
    """4.089 billion multiplications an image: each layer's, times how many of its shape the network has."""

    def occurrences(layer: Layer) -> int:
        stage, _, rest = layer.name.removeprefix("layer").partition(".")
        if not layer.name.startswith("layer") or rest.startswith("0."):
            return 1  # one of a kind
        return RESNET50_BLOCKS[int(stage) - 1] - (rest == "conv1")  # the first of a stage has another input

    total = sum(layer.m * layer.n * layer.k * occurrences(layer) for layer in SUITES["resnet50"]) / 64
    assert round(total / 1e9, 3) == 4.089


@pytest.mark.parametrize("recipe", ["int8", "fp8", "psq8"])
def test_each_layer_poses_its_three_products_and_the_quantizations_of_x_w_and_dy(recipe):
    found = suites.problems(["vit-large"], H100, [recipe])
    wanted = {tuple(map(tuned.bucket, shape)) for _, m, n, k in SUITES["vit-large"]
              for shape in ((m, n, k), (m, k, n), (n, k, m))}  # fmt: skip
    assert {tuned.key(p)[5:] for p in found if p.op == "scaled_mm"} == wanted
    quantized = {(p.m, p.n) for p in found if p.op != "scaled_mm"}
    for _, m, n, k in SUITES["vit-large"]:
        buckets = {tuple(map(tuned.bucket, shape)) for shape in quantized}
        assert {tuple(map(tuned.bucket, shape)) for shape in ((m, k), (n, k), (m, n))} <= buckets


def test_there_is_one_problem_of_each_key_and_counts_add_up():
    found = suites.problems(SUITES, H100)
    keys = [tuned.key(problem) for problem in found]
    assert len(set(keys)) == len(keys)
    layers = sum(len(layers) for layers in SUITES.values())
    assert sum(n for p, n in found.items() if p.op == "scaled_mm") == 3 * layers
    assert all(p.device == "cuda" and (p.arch, p.processors) == H100[:2] and p.force == "auto" for p in found)


def test_the_convolutions_of_resnet50_pose_their_products_as_often_as_it_has_them():
    """53 convolutions at batch 256; the first has no dgrad, and quantizes dY for wgrad alone."""
    found = suites.problems(["resnet50-conv"], H100)
    keys = [tuned.key(problem) for problem in found]
    assert len(set(keys)) == len(keys)

    def times(op, word=""):
        return sum(n for p, n in found.items() if p.op == op and word in p.kind)

    assert times("conv") - times("conv", "dgrad") == times("conv_wgrad") == times("arrange_filters") == 53
    assert times("conv", "dgrad") == times("quantize_gradient_images") == 52
    assert times("quantize_images", "nearest both") == 53 and times("quantize_images", "stochastic cols") == 1
    work = sum(p.m * p.n * p.k * n for p, n in found.items() if p.op == "conv_wgrad") / 256
    assert round(work / 1e9, 3) == 4.087  # without the last layer's 0.002
    assert suites.convolutions(["vit-large"]) == [] and not suites.problems(["resnet50-conv"], H100, ["fp8"])


def test_an_unknown_suite_is_named():
    with pytest.raises(ValueError, match=r"'gpt-9'; there are llama-8b, .*resnet50-conv"):
        suites.layers(["gpt-9"])
