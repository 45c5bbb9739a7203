"""Photometric changes against Pillow and torchvision, and what is drawn for them."""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from PIL import ImageFilter, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as to_and_fro
from torchvision.transforms.v2 import functional as tv

from ser_reg import GroupElement, SERError, View
from ser_reg.views import Photometric, stages
from ser_reg.views.colour import OPERATIONS, box_reach, box_taps

NEVER = Photometric(jitter=0, grey=0, blur=0, solarize=0)
ALWAYS = Photometric(jitter=1, grey=0.3, blur=1, solarize=0.3)
FACTORS = ("brightness", "contrast", "saturation", "hue")
COLOURS = {
    "brightness": lambda image, drawn: tv.adjust_brightness(image, drawn["brightness"]),
    "contrast": lambda image, drawn: tv.adjust_contrast(image, drawn["contrast"]),
    "saturation": lambda image, drawn: tv.adjust_saturation(image, drawn["saturation"]),
    "hue": lambda image, drawn: tv.adjust_hue(image, drawn["hue"]),
}
ALONE = {
    "grey": lambda image, _: tv.rgb_to_grayscale(image, 3),
    "blur": lambda image, drawn: image.filter(ImageFilter.GaussianBlur(drawn["sigma"])),
    "solarize": lambda image, _: ImageOps.solarize(image, 128),
}


def photographs(n=6, size=(40, 56)):
    """Patches of colour with noise, values of 256 steps; the last two: noise up to black and white, and one colour."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 5, 7, generator=draw)
    images = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    images += 0.1 * torch.randn(images.shape, generator=draw)
    images[-2] = (3 * torch.rand(3, *size, generator=draw) - 1).clamp(0, 1)
    images[-1] = torch.tensor([1.0, 0.2, 0.0])[:, None, None]
    return images.clamp(0, 1).mul(255).round().div(255)


def drawn_for(n, **values):
    """Draws that do nothing but what is said."""
    drawn = NEVER.draw(n)
    return {name: torch.full_like(drawn[name], values[name]) if name in values else drawn[name] for name in drawn}


def literal(images, drawn):
    """Image by image, operation by operation, by Pillow."""
    results = []
    for i, image in enumerate(images):
        one = {name: values[i].tolist() for name, values in drawn.items()}
        picture = to_and_fro.to_pil_image(image)
        if one["jitter"]:
            for number in one["order"]:
                name = FACTORS[number]
                if name != "hue" or one["hue"]:  # 256 steps change an image even where they move by nothing
                    picture = COLOURS[name](picture, one)
        for name, change in ALONE.items():
            picture = change(picture, one) if one[name] else picture
        results.append(to_and_fro.to_tensor(picture))
    return torch.stack(results)


def steps(found, expected):
    """(B, 3, H, W): how many of 256 steps they differ."""
    return (255 * (found - expected)).abs().round()


@pytest.mark.parametrize("factor", [0.0, 0.37, 0.8, 1.13, 1.4, 2.5])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_are_pillows_to_the_bit(name, factor):
    images, drawn = photographs(), drawn_for(6, jitter=True, **{name: factor})
    expected = torch.stack(
        [to_and_fro.to_tensor(COLOURS[name](to_and_fro.to_pil_image(x), {name: factor})) for x in images]
    )
    assert torch.equal(NEVER.apply(images, drawn), expected)
    assert not torch.equal(images, expected)


@pytest.mark.parametrize("name", ["grey", "solarize"])
def test_what_has_no_factor_is_pillows_to_the_bit(name):
    images, drawn = photographs(), drawn_for(6, **{name: True})
    assert torch.equal(NEVER.apply(images, drawn), literal(images, drawn))


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.004, 0.002, 0.03, 0.1, 0.5])
def test_hue_is_pillows_but_for_ties(shift):
    images, drawn = photographs(), drawn_for(6, jitter=True, hue=shift)
    expected = torch.stack([to_and_fro.to_tensor(tv.adjust_hue(to_and_fro.to_pil_image(x), shift)) for x in images])
    off = steps(NEVER.apply(images, drawn), expected)
    assert off.mean() < 0.03
    assert off.max() <= 6
    assert (off > 0).any(1).float().mean() < 0.01


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 1.41, 1.42, 2.0, 3.7])
def test_blur_is_pillows_but_for_roundings_between(sigma):
    images, drawn = photographs(), drawn_for(6, blur=True, sigma=sigma)
    off = steps(Photometric(sigma=(0, 4)).apply(images, drawn), literal(images, drawn))
    assert off[..., 12:-12, 12:-12].max() <= 3
    assert off.mean() < 1


def test_weights_of_a_blur_have_its_deviation():
    sigma = torch.linspace(0, 4, 81, dtype=torch.float64)
    taps = box_taps(sigma, box_reach(4.0))
    away = torch.arange(taps.shape[1])
    torch.testing.assert_close(taps[:, 0] + 2 * taps[:, 1:].sum(1), torch.ones(81, dtype=torch.float64))
    torch.testing.assert_close(2 * (taps * away**2).sum(1), sigma**2)
    for deviation, some in zip(sigma.tolist(), taps, strict=True):
        assert not some[box_reach(deviation) + 1 :].any()


def test_whole_chain_in_any_order_is_pillows():
    images = photographs(48)
    drawn = ALWAYS.draw(48, torch.Generator().manual_seed(1))
    assert len({tuple(order) for order in drawn["order"].tolist()}) > 15
    off = steps(ALWAYS.apply(images, drawn), literal(images, drawn)).mean((1, 2, 3))
    assert off.mean() < 1
    assert off.max() < 2
    drawn["blur"][:] = False
    off = steps(ALWAYS.apply(images, drawn), literal(images, drawn)).mean((1, 2, 3))
    assert off.mean() < 0.03
    drawn["hue"][:] = 0
    assert torch.equal(ALWAYS.apply(images, drawn), literal(images, drawn))


def test_ends_in_256_values_inside_the_range():
    changed = ALWAYS.apply(torch.rand(32, 3, 20, 20), ALWAYS.draw(32))
    assert torch.equal(changed, (changed * 255).round() / 255)
    assert 0 <= changed.min() < changed.max() <= 1


def test_an_image_that_nothing_was_drawn_for_stays_as_it_is():
    images = torch.rand(9, 3, 8, 8)
    drawn = NEVER.draw(9)
    assert torch.equal(NEVER.apply(images, drawn), images)
    drawn["solarize"][4] = True
    expected = images.clone()
    expected[4] = (images[4] * 255).round().div(255)
    expected[4] = torch.minimum(expected[4], 1 - expected[4])
    torch.testing.assert_close(NEVER.apply(images, drawn), expected)
    assert torch.equal(NEVER.apply(images, drawn)[5:], images[5:])


def test_what_is_given_stays_as_it_was():
    images, drawn = torch.rand(8, 3, 16, 16), ALWAYS.draw(8)
    before, draws = images.clone(), {name: values.clone() for name, values in drawn.items()}
    ALWAYS.apply(images, drawn)
    assert torch.equal(images, before)
    assert all(torch.equal(drawn[name], draws[name]) for name in draws)
    assert not ALWAYS(images.requires_grad_()).requires_grad


SOMETIMES = Photometric(jitter=0.6, grey=0.4, blur=0.5, solarize=0.4)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_each_image_is_changed_by_its_own_draws_whatever_else_is_in_the_batch(chunk, monkeypatch):
    images, drawn = torch.rand(17, 3, 18, 22), SOMETIMES.draw(17)
    alone = [
        SOMETIMES.apply(images[i : i + 1], {name: values[i : i + 1] for name, values in drawn.items()})
        for i in range(17)
    ]
    for name in ("CHUNK_BYTES", "CHUNK_BYTES_OF_THREADS"):
        monkeypatch.setattr(stages, name, chunk * images[0].numel() * 4)
    assert torch.equal(SOMETIMES.apply(images, drawn), torch.cat(alone))
    assert torch.equal(SOMETIMES.apply(images.to(memory_format=torch.channels_last), drawn), torch.cat(alone))


def test_only_who_takes_part_is_worked_on(monkeypatch):
    drawn = SOMETIMES.draw(40)
    seen = dict.fromkeys(OPERATIONS, 0)

    def counting(name):
        def operation(x, values):
            seen[name] += len(x)
            return OPERATIONS[name](x, values)

        return operation

    monkeypatch.setattr(stages, "OPERATIONS", {name: counting(name) for name in OPERATIONS})
    SOMETIMES.apply(torch.rand(40, 3, 6, 6), drawn)
    times = {name: int(drawn["jitter" if name in FACTORS else name].sum()) for name in OPERATIONS}
    assert seen == times


class Counted(TorchDispatchMode):
    """How many operators are called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_work_is_shared_by_groups_and_nothing_is_read_from_the_device():
    """The meta device has no values: whoever reads one raises."""
    calls = []
    for n in (64, 512):
        images, drawn = torch.rand(n, 3, 32, 32, device="meta"), SOMETIMES.draw(n)
        with Counted() as counted:
            assert SOMETIMES.apply(images, drawn).shape == images.shape
        calls.append(counted.calls)
        there = {name: values.to("meta") for name, values in drawn.items()}
        assert SOMETIMES.apply(images, there).shape == images.shape
    assert calls[1] < 1.1 * calls[0]


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_is_one_graph_and_gives_the_same(backend):
    torch.compiler.reset()
    compiled = torch.compile(SOMETIMES.apply, backend=backend, fullgraph=True)
    images = torch.rand(23, 3, 16, 20)
    for seed in range(2):
        drawn = SOMETIMES.draw(23, torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(images, drawn), SOMETIMES.apply(images, drawn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_masks_give_what_groups_give(dtype, n):
    images, drawn = torch.rand(n, 3, 16, 20).to(dtype), SOMETIMES.draw(n)
    found = stages.masked(images, drawn, box_reach(2.0))
    assert torch.equal(found, stages.grouped(images, drawn))
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_changed_as_float32_is(dtype):
    images = photographs()
    drawn = ALWAYS.draw(len(images))
    changed = ALWAYS.apply(images.to(dtype), drawn)
    assert changed.dtype == dtype
    if dtype != torch.float64:
        images = images.to(dtype).float()  # of which half precision has fewer values
    expected = ALWAYS.apply(images, drawn)
    assert torch.equal(
        changed, (expected.to(torch.promote_types(dtype, torch.float32)) * 255).round().div(255).to(dtype)
    )


def test_no_image_is_none_still():
    for size in ((8, 8), (1, 5)):
        assert ALWAYS(torch.zeros(0, 3, *size)).shape == (0, 3, *size)
        assert ALWAYS(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_draws_follow_the_law_of_torchvision():
    n = 20000
    photometric = Photometric(0.4, 1.5, 0.2, 0.1, jitter=1, sigma=(0.5, 2))
    drawn = photometric.draw(n, torch.Generator().manual_seed(0))
    jitter = ColorJitter(0.4, 1.5, 0.2, 0.1)
    ranges = {name: getattr(jitter, name) for name in FACTORS} | {"sigma": (0.5, 2.0)}
    for name, (low, high) in ranges.items():
        values = drawn[name][drawn["blur"]].double() if name == "sigma" else drawn[name].double()
        assert low - 1e-6 <= values.min() < low + 0.01 * (high - low)
        assert high + 1e-6 >= values.max() > high - 0.01 * (high - low)
        parts = torch.histc((values - low) / (high - low), 10, 0, 1) / len(values)
        assert (parts - 0.1).abs().max() < 5 * math.sqrt(0.09 / len(values))
    assert jitter.contrast == [0.0, 2.5] or jitter.contrast == (0.0, 2.5)
    orders = drawn["order"] @ torch.tensor([64, 16, 4, 1])
    _, counts = orders.unique(return_counts=True)
    assert len(counts) == 24
    assert (counts / n - 1 / 24).abs().max() < 5 * math.sqrt(1 / 24 / n)
    assert torch.equal(drawn["order"].sort(1).values, torch.arange(4).expand(n, 4))
    independent = torch.stack([*(drawn[name].double() for name in FACTORS), orders.double(), drawn["blur"].double()])
    assert (torch.corrcoef(independent) - torch.eye(6)).abs().max() < 5 / math.sqrt(n)


def test_probabilities_are_met_independently():
    n = 20000
    photometric = Photometric(jitter=0.8, grey=0.2, blur=0.1, solarize=0.3)
    drawn = photometric.draw(n, torch.Generator().manual_seed(0))
    for name in ("jitter", "grey", "blur", "solarize"):
        p = getattr(photometric, name)
        assert abs(drawn[name].double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    applied = torch.stack([drawn[name].double() for name in ("jitter", "grey", "blur", "solarize")])
    assert (torch.corrcoef(applied) - torch.eye(4)).abs().max() < 5 / math.sqrt(n)
    for p, share in ((0, 0), (1, 1)):
        assert Photometric(jitter=p, grey=p, blur=p, solarize=p).draw(500)["jitter"].double().mean() == share


def test_drawn_has_the_identity_where_nothing_was_applied():
    drawn = SOMETIMES.draw(200)
    still, sharp = ~drawn["jitter"], ~drawn["blur"]
    assert still.any()
    assert sharp.any()
    for name, identity in zip(FACTORS, (1, 1, 1, 0), strict=True):
        assert (drawn[name][still] == identity).all()
        assert (drawn[name][~still] != identity).all()
    assert torch.equal(drawn["order"][still], torch.arange(4).expand(int(still.sum()), 4))
    assert (drawn["sigma"][sharp] == 0).all()
    assert (drawn["sigma"][~sharp] > 0).all()
    kinds = {name: (tuple(values.shape), values.dtype, values.device.type) for name, values in drawn.items()}
    flags, numbers = ((200,), torch.bool, "cpu"), ((200,), torch.float32, "cpu")
    assert kinds == {
        **dict.fromkeys(("jitter", "grey", "blur", "solarize"), flags),
        **dict.fromkeys((*FACTORS, "sigma"), numbers),
        "order": ((200, 4), torch.int64, "cpu"),
    }


def test_a_range_of_nothing_leaves_the_operation_out():
    """Hue and saturation in 256 steps change an image even where they are moved by nothing: torchvision skips them."""
    images = photographs()
    still = Photometric(0, 0, 0, 0, jitter=1, grey=0, blur=0)
    assert torch.equal(still(images), images)
    assert not torch.equal(Photometric(0, 0, 0, 1e-5, jitter=1, grey=0, blur=0)(images), images)


def test_factors_of_a_jitter_that_was_not_applied_do_nothing():
    images, drawn = photographs(), drawn_for(6, brightness=0.5, hue=0.2)
    assert torch.equal(NEVER.apply(images, drawn), images)
    assert torch.equal(stages.masked(images, drawn, 3), images)


def test_a_generator_owns_the_randomness():
    images = torch.rand(8, 3, 12, 12)
    before = torch.get_rng_state()
    one, other = (ALWAYS(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one, ALWAYS(images, torch.Generator().manual_seed(4)))
    torch.manual_seed(5)
    one = ALWAYS(images)
    torch.manual_seed(5)
    assert torch.equal(ALWAYS(images), one)


def test_a_view_says_what_was_drawn():
    upright = View(torch.rand(5, 3, 12, 12), GroupElement.turn(1, n=5), {"theta": torch.zeros(5, 2)})
    view = ALWAYS.view(upright, torch.Generator().manual_seed(3))
    drawn = ALWAYS.draw(5, torch.Generator().manual_seed(3))
    assert view.relation == upright.relation
    assert view.drawn.keys() == {"theta", *drawn}
    assert all(torch.equal(view.drawn[name], drawn[name]) for name in drawn)
    assert torch.equal(view.images, ALWAYS.apply(upright.images, drawn))
    assert upright.drawn.keys() == {"theta"}


def test_travels_and_shows_its_settings():
    photometric = Photometric(hue=0.2, sigma=(0.3, 1.0))
    text = (
        "Photometric(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.2, jitter=0.8, grey=0.2, blur=0.5, "
        "sigma=(0.3, 1.0), solarize=0.0)"
    )
    for other in (pickle.loads(pickle.dumps(photometric)), copy.deepcopy(photometric), eval(text)):
        assert repr(other) == text
        drawn, again = (one.draw(4, torch.Generator().manual_seed(0)) for one in (photometric, other))
        assert all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_values_that_round_to_the_range_are_taken_and_clamped():
    images = torch.full((3, 3, 8, 8), 1.001)
    images[:, :, 0] = -0.001
    for photometric in (NEVER, ALWAYS):
        changed = photometric(images)
        assert (changed.min(), changed.max()) >= (0, 0)
        assert changed.max() <= 1


def without(name):
    drawn = ALWAYS.draw(2)
    del drawn[name]
    return drawn


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ALWAYS(torch.rand(3, 8, 8)), "photometric(images[None])"),
        (lambda: ALWAYS(torch.rand(2, 1, 8, 8)), "images.expand(-1, 3, -1, -1)"),
        (lambda: ALWAYS(torch.rand(2, 4, 8, 8)), "images[:, :3]"),
        (lambda: ALWAYS(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), "images.float() / 255"),
        (lambda: ALWAYS([torch.rand(3, 8, 8)]), "torch.stack(list(images))"),
        (lambda: ALWAYS(255 * torch.ones(2, 3, 8, 8)), "photometric(images / 255)"),
        (lambda: NEVER(torch.full((2, 3, 8, 8), -0.01)), "photometric(images.clamp(0, 1))"),
        (lambda: ALWAYS(torch.full((2, 3, 8, 8), 1.01)), "values from 1.01 to 1.01"),
        (lambda: ALWAYS(torch.full((2, 3, 8, 8), math.nan)), "values from nan to nan"),
        (lambda: ALWAYS.apply(torch.rand(2, 3, 8, 8), ALWAYS.draw(3)), "draws for each of 2 images"),
        (lambda: ALWAYS.apply(torch.rand(2, 3, 8, 8), without("hue")), "drawn without hue"),
        (lambda: ALWAYS.view(View(torch.rand(2, 1, 8, 8), GroupElement.identity(2), {})), "red, green and blue"),
        (lambda: ALWAYS.draw(-1), "photometric.draw(len(images))"),
        (lambda: ALWAYS.draw(torch.rand(2, 3, 8, 8)), "a Tensor for n"),
        (lambda: ALWAYS.apply(torch.rand(2, 3, 8, 8), None), "a NoneType"),
        (
            lambda: ALWAYS.apply(torch.rand(2, 3, 8, 8), {**ALWAYS.draw(2), "hue": torch.zeros(2).double()}),
            "hue of torch.float64",
        ),
        (lambda: ALWAYS.apply(torch.rand(2, 3, 8, 8), {**ALWAYS.draw(2), "grey": [True, False]}), "grey of list"),
        (lambda: ALWAYS.view(torch.rand(2, 3, 8, 8)), "photometric(images)"),
        (lambda: ALWAYS(torch.full((2, 3, 8, 8), -1.5)), "photometric(images * std + mean)"),
        (lambda: ALWAYS.draw(2, SimpleNamespace(device=torch.device("cuda"))), "a generator on cuda"),
        (lambda: ALWAYS.draw(2, 7), "generator = torch.Generator().manual_seed(0)"),
        (lambda: Photometric(brightness=-0.1), "Photometric(brightness=0.4)"),
        (lambda: Photometric(contrast=math.inf), "contrast=inf"),
        (lambda: Photometric(saturation=(0.8, 1.2)), "saturation=(0.8, 1.2)"),
        (lambda: Photometric(hue=0.6), "a part of a turn from 0 to 0.5"),
        (lambda: Photometric(jitter=80), "a probability, 0 to 1"),
        (lambda: Photometric(grey=True), "grey=True"),
        (lambda: Photometric(blur="often"), "blur='often'"),
        (lambda: Photometric(solarize=math.nan), "solarize=nan"),
        (lambda: Photometric(sigma=2.0), "Photometric(sigma=(0.1, 2.0))"),
        (lambda: Photometric(sigma=(2.0, 0.1)), "sigma=(2.0, 0.1)"),
    ],
)
def test_bad_input_says_what_to_type(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)
