"""Views on the device: how b2 is moved, by which elements, on which rank, and that settings decide about it."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")

from data.batch import Batch, Group
from pretraining.views import DeviceViews, ViewSettings
from pretraining_jobs import METHODS, parsed
from tiny_batches import engine_batches

from ser_reg.images import IMAGENET

close = torch.testing.assert_close


def noise(n, local_views=0):
    """A batch of n whole images: noise, on which it shows how it is resampled."""
    sides = [32] * 2 + [16] * local_views
    images = [torch.randint(256, (n, 3, side, side), dtype=torch.uint8) for side in sides]
    crops = Group([x[:0] for x in images])
    return Batch(crops, Group(images), torch.arange(n), [])


def by_pillow(image, element):
    """One image as an element moves it: resized, flipped, turned counter-clockwise."""
    height, width = (
        round(side * factor) for side, factor in zip(image.shape[-2:], *element.scale.tolist(), strict=True)
    )
    channels = []
    for channel, mean, std in zip(image.numpy(), *IMAGENET, strict=True):
        picture = Image.fromarray(((channel / 255 - mean) / std).astype(np.float32))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if element.flip else picture
        for _ in range(int(element.turns)):
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        channels.append(np.asarray(picture))
    return torch.from_numpy(np.stack(channels))


def test_whole_images_are_moved_as_their_relations_say_and_as_pillow_does():
    """Which pins the direction of the relation, and antialiasing: Pillow has it whenever it shrinks."""
    batch, shrunk = noise(5, local_views=2), False
    views = DeviceViews(ViewSettings(scale=(0.3, 1.3)).maker(4), whole=5, seed=0)
    for number in range(4):
        _, group = views(batch, number)
        for images, view in zip(batch.whole.images, group.views, strict=True):
            shrunk |= view.images.shape[-1] < 0.7 * images.shape[-1]
            for i in range(5):
                close(view.images[i], by_pillow(images[i], view.relation[i]), rtol=1e-3, atol=1e-3)
    assert shrunk


def test_all_views_have_elements_of_their_own():
    views = DeviceViews(ViewSettings().maker(4), whole=16, seed=0)
    relations = views(noise(16, local_views=2), 0)[1].relations
    drawn = [(g.turns.tolist(), g.flip.tolist()) for g in relations]
    assert all(drawn.count(one) == 1 for one in drawn)
    assert all(len(set(zip(turns, flips, strict=True))) == 4 for turns, flips in drawn)  # of one parity


@pytest.mark.parametrize("whole", [7, 2])
def test_ranks_have_the_elements_of_one_process_and_its_grids(whole):
    """Images are dealt one by one; a rank without any has views without rows."""
    batch = noise(whole)
    alone = DeviceViews(ViewSettings().maker(4), whole, seed=3)(batch, 5)[1]
    for rank in range(4):
        own = batch._replace(whole=Group([x[rank::4] for x in batch.whole.images]))
        found = DeviceViews(ViewSettings().maker(4), whole, 3, rank, 4)(own, 5)[1]
        for view, expected in zip(found.views, alone.views, strict=True):
            assert torch.equal(view.images, expected.images[rank::4])
            assert view.relation == expected.relation[rank::4]


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


def test_crops_and_whole_images_are_normalised():
    batch = noise(2)
    b1, b2 = DeviceViews(ViewSettings(False, False, (1, 1), (1, 1)).maker(4), 2, 0)(
        batch._replace(crops=batch.whole), 0
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    for x, crop, whole in zip(batch.whole.images, b1.images, b2.images, strict=True):
        close(crop, (x / 255 - mean) / std)
        close(whole, crop)


def test_without_whole_images_there_is_one_group():
    groups = next(engine_batches("moco_v3", parsed("moco_v3", ["none"])))
    assert [group.relations for group in groups] == [None]
