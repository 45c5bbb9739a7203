"""Views on the device: colours, turns, elements, paths; whose they are on which rank, and that settings decide."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")

from data.batch import Batch, Group
from data.recipe import normalise
from pretraining.device_views import DeviceViews
from pretraining.policies import POLICIES
from pretraining.views import ViewSettings, maker
from pretraining_jobs import METHODS, parsed
from tiny_batches import batches, engine_batches

from ser_reg import Affine, GroupElement, act
from ser_reg.images import IMAGENET
from ser_reg.objectives import OBJECTIVES
from ser_reg.views import Photometric

close = torch.testing.assert_close
UNCHANGED = Photometric(jitter=0, grey=0, blur=0)
WORDS = [["ser"], ["ser", "--term.crops", "--term.ratio", "0.5"], *([word] for word in OBJECTIVES if word != "ser")]


def noise(n, local_views=0):
    """A batch of n whole images: noise, on which it shows how it is resampled."""
    sides = [32] * 2 + [16] * local_views
    images = [torch.randint(256, (n, 3, side, side), dtype=torch.uint8) for side in sides]
    crops = Group([x[:0] for x in images], [Affine.identity(0)] * len(images))
    whole = Group(images, [Affine.identity(n)] * len(images))
    return Batch(crops, whole, torch.arange(n), torch.arange(n), [])


def device_views(n, local_views=0, **settings):
    """Of n whole images, whose colours stay as they are."""
    whole = POLICIES["equivariant"]
    moves = maker(ViewSettings(**settings), whole, 4, [], [])
    return DeviceViews([UNCHANGED] * (2 + local_views), whole, moves, (n, n), seed=0)


def by_pillow(image, element):
    """One image as an element moves it: resized, flipped, turned counter-clockwise."""
    height, width = (
        round(side * factor) for side, factor in zip(image.shape[-2:], *element.scale.tolist(), strict=True)
    )
    channels = []
    for channel in image.numpy():
        picture = Image.fromarray((channel / 255).astype(np.float32))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if element.flip else picture
        for _ in range(int(element.turns)):
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        channels.append(np.asarray(picture).clip(0, 1))
    return normalise(torch.from_numpy(np.stack(channels)))


def test_whole_images_are_moved_as_their_relations_say_and_as_pillow_does():
    """Which pins the direction of the relation, and antialiasing: Pillow has it whenever it shrinks."""
    batch, shrunk = noise(5, local_views=2), False
    views = device_views(5, local_views=2, scale=(0.3, 1.3))
    for number in range(4):
        (group,) = views(batch, number)
        for images, view in zip(batch.term.images, group.views, strict=True):
            shrunk |= view.images.shape[-1] < 0.7 * images.shape[-1]
            for i in range(5):
                close(view.images[i], by_pillow(images[i], view.relation[i]), rtol=1e-3, atol=1e-3)
    assert shrunk


def test_all_views_have_elements_of_their_own():
    (group,) = device_views(16, local_views=2)(noise(16, local_views=2), 0)
    drawn = [(g.turns.tolist(), g.flip.tolist()) for g in group.relations]
    assert all(drawn.count(one) == 1 for one in drawn)
    assert all(len(set(zip(turns, flips, strict=True))) == 4 for turns, flips in drawn)  # of one parity


# Ranks


def rows(group):
    """All that there is of each image of a group: images, relations, draws; of the extra views as well."""
    relations = group.relations or []
    tables = [*group.images, *(r.matrix if isinstance(r, Affine) else r.matrix() for r in relations)]
    tables += [values for drawn in group.drawn for values in drawn.values()]
    for view in group.extra:
        turns = len(view.images) // max(1, len(group.images[0]))
        several = [view.images, view.relation.matrix, *view.drawn.values()]
        tables += [part for values in several for part in values.chunk(max(1, turns))]
    return tables


@pytest.mark.parametrize("word", WORDS, ids=" ".join)
def test_ranks_have_the_views_of_one_process(word):
    """Images are dealt one by one, those of pairs two by two; a rank may have none that the term reads."""
    few = ["--term.ratio", 0.5 if word == ["stl"] else 3 / 16]
    settings = parsed("moco_v3", [*word, *few, "--crop-turns", "--steps", 1])
    together = 2 if settings.term.policy.paired else 1
    alone = list(batches("moco_v3", settings))
    for rank in (1, 3):
        for found, groups in zip(batches("moco_v3", settings, rank, 4), alone, strict=True):
            first = 0
            for mine, whole in reversed(list(zip(found, groups, strict=True))):  # the term's images come first
                n = len(whole.images[0])
                which = [i for i in range(n) if (first + i) // together % 4 == rank]
                first += n
                assert len(mine.images[0]) == len(which)
                assert len(mine.images) == len(whole.images)
                for values, expected in zip(rows(mine), rows(whole) if which else rows(mine), strict=True):
                    assert torch.equal(values, expected[which])


def moved(method, flags, **engine):
    """Turns, flips and sizes of the views of b2, by batch, as the engine makes them."""
    settings = parsed(method, flags)
    steps = list(engine_batches(method, settings, **engine))
    return [
        [(g.turns.tolist(), g.flip.tolist(), tuple(x.shape[-2:])) for x, g in zip(b2.images, b2.relations, strict=True)]
        for _, b2 in steps
    ]


def of_all(found):
    turns, flips, sizes = zip(*(view for views in found for view in views), strict=True)
    return {t for one in turns for t in one}, {f for one in flips for f in one}, set(sizes)


@pytest.mark.parametrize(
    ("flags", "turns", "flips", "sizes"),
    [
        (["--no-rotations"], {0}, {False, True}, None),
        (["--no-flips"], {0, 1, 2, 3}, {False}, None),
        (["--scale", 1, 1, "--aspect", 1, 1], {0, 1, 2, 3}, {False, True}, {(32, 32)}),
        (["--scale", 0.25, 0.25, "--aspect", 1, 1], {0, 1, 2, 3}, {False, True}, {(16, 16)}),
        (["--scale", 1, 1, "--aspect", 4, 4], {0, 1, 2, 3}, {False, True}, {(16, 64), (64, 16)}),
    ],
)
def test_settings_of_the_group_decide(flags, turns, flips, sizes):
    found = of_all(moved("dino", [*flags, "--steps", 8]))
    assert found[:2] == (turns, flips)
    assert found[2] == sizes if sizes else len(found[2]) > 4


@pytest.mark.parametrize("method", METHODS)
def test_sizes_of_the_default_group_are_those_of_the_paper(method):
    """Section 4.1: areas of .7 to 1.3, whole patches of 4 pixels."""
    turns, flips, sizes = of_all(moved(method, ["--steps", 10]))
    assert (turns, flips) == ({0, 1, 2, 3}, {False, True})
    assert all(side % 4 == 0 for size in sizes for side in size)
    areas = [height * width / 32**2 for height, width in sizes]
    assert 0.55 < min(areas) < 0.9 < 1.1 < max(areas) < 1.5
    assert len({height / width for height, width in sizes}) > 4


def test_every_batch_has_elements_of_its_own_which_its_number_tells():
    """The same in a run that goes on, on each rank, and in another run of the seed; a part of a step counts as one."""
    flags = ["--steps", 6]
    found = moved("dino", flags)
    assert all(found.count(batch) == 1 for batch in found)
    assert moved("dino", flags, done=4) == found[4:]
    assert moved("dino", [*flags, "--seed", 1])[0] != found[0]
    parts = moved("dino", [*flags, "--accumulate", 2, "--batch-size", 32], done=2)
    assert parts == moved("dino", ["--steps", 12])[4:]
    for rank in (0, 3):
        shares = moved("dino", flags, rank=rank, world_size=4)
        own = [[(t[rank::4], f[rank::4], size) for t, f, size in batch] for batch in found]
        assert shares == own


def test_views_are_normalised():
    batch = noise(2)
    (group,) = device_views(2, rotations=False, flips=False, scale=(1, 1), aspect=(1, 1))(batch, 0)
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    for x, view in zip(batch.term.images, group.images, strict=True):
        close(view, (x / 255 - mean) / std)


def test_without_a_term_there_is_one_group():
    groups = next(engine_batches("moco_v3", parsed("moco_v3", ["none"])))
    assert [group.relations for group in groups] == [None]


# Crops


def first_batch(*flags):
    return next(batches("moco_v3", parsed("moco_v3", list(flags))))


@pytest.mark.parametrize("word", ["augself", "equimod", "essl"])
def test_the_base_method_sees_the_same_with_a_term_and_without(word):
    """And so it does where the term of weight 0 is left out, with all that it alone would see."""
    (plain,), (read,), (control,) = (first_batch(*f) for f in (["none"], [word], [word, "--term.weight", 0]))
    for one, two, three in zip(plain.images, read.images, control.images, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert control.relations is None
    assert not control.extra


@pytest.mark.parametrize("word", ["stl", "reconstruction"])
def test_a_control_keeps_views_that_the_base_method_sees(word):
    (plain,), (read,), (control,) = (first_batch(*f) for f in (["none"], [word], [word, "--term.weight", 0]))
    assert not torch.equal(plain.images[1], read.images[1])
    assert all(torch.equal(x, y) for x, y in zip(read.images, control.images, strict=True))


def test_what_was_drawn_is_what_was_done():
    """Colours, in each view by its own recipe, and quarter turns upon the crops as they were loaded."""
    (loaded,), (turned,) = (first_batch("augself", "--blur", *more) for more in ([], ["--crop-turns"]))
    shares = [view.drawn["blur"].float().mean() for view in loaded.views]
    assert shares[0] == 1 > shares[1]
    drawn = {name: torch.cat([view.drawn[name] for view in loaded.views]) for name in ("jitter", "hue", "grey")}
    assert len(drawn["hue"].unique()) == drawn["jitter"].sum() + 1  # each image its own, and none
    for view, other in zip(loaded.views, turned.views, strict=True):
        assert {name: v.tolist() for name, v in view.drawn.items()} == {n: v.tolist() for n, v in other.drawn.items()}
        moved = other.relation @ ~view.relation
        assert set(moved.turns.tolist()) == {0, 1, 2, 3}
        still = torch.zeros_like(view.relation.flip)
        element = GroupElement(moved.turns, still, torch.ones(len(still), 2, dtype=torch.float64))
        assert torch.equal(other.images, act(element, view.images))


def test_an_original_is_the_middle_of_the_image_as_it_is():
    (group,) = first_batch("equimod")
    (view,) = group.extra
    assert view.images.shape == group.images[0].shape
    top, left, height, width = view.relation.box.unbind(1)
    close(top + height / 2, torch.full_like(top, 0.5), atol=0.04, rtol=0)
    close(left + width / 2, torch.full_like(top, 0.5), atol=0.04, rtol=0)
    assert not view.relation.flip.any()


def test_a_small_crop_is_seen_in_its_four_turns():
    (group,) = first_batch("essl", "--local-size", 20)
    (view,) = group.extra
    assert view.images.shape == (4 * 16, 3, 20, 20)
    for k, (images, turns) in enumerate(zip(view.images.chunk(4), view.relation.turns.chunk(4), strict=True)):
        assert torch.equal(images, view.images[:16].rot90(k, (-2, -1)))
        assert (turns == k).all()
    box = view.relation.box[:16]
    assert 0.03 < (box[:, 2] * box[:, 3]).min() < (box[:, 2] * box[:, 3]).max() < 0.17
    assert all(torch.equal(values[:16], values[48:]) for values in view.drawn.values())


def test_pairs_share_what_is_aligned_and_have_the_rest_of_their_own():
    (group,) = first_batch("stl", "--batch-size", 64, "--crop-turns", "--blur")
    for view in group.views:
        relation, drawn = view.relation, view.drawn
        shared = {"box": relation.box, "turns": relation.turns}
        shared |= {name: drawn[name] for name in ("jitter", "order", "brightness", "saturation", "hue", "grey")}
        for name, values in shared.items():
            assert torch.equal(values[::2], values[1::2]), name
            assert len(values[::2].unique(dim=0)) > 1, name
        assert not torch.equal(relation.flip[::2], relation.flip[1::2])
    assert not torch.equal(drawn["sigma"][::2], drawn["sigma"][1::2])


def test_a_path_leads_from_the_second_crop_to_the_second_view():
    still = ["reconstruction", "--path", "translation", "--path-fill", "zeros"]
    (group,) = first_batch(*still, "--path-targets", 3)
    second, *targets = group.views[1], *group.extra
    assert len(targets) == 3
    for k, view in enumerate(targets, start=1):
        close(view.drawn["theta"], second.drawn["theta"] * k / 4)
        assert 0 <= view.images.min() < 0.2 < 0.8 < view.images.max() <= 1
    (crops,) = first_batch("none")
    assert torch.equal(group.images[0], crops.images[0])
    start = Affine.translation(*-second.drawn["theta"].double().T) @ second.relation
    assert start.box.shape == (16, 4)  # what is left is a crop
    black = (normalise(second.images.new_zeros(1, 3, 1, 1)) - second.images).abs().sum(1) < 0.2  # bicubic
    rows = second.drawn["theta"][:, 0]
    assert black[rows > 0.04, 0].all()  # moved down: nothing is seen at the top
    assert black[rows < -0.04, -1].all()
    assert not black.all()
