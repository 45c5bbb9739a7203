"""Views and batches: functions of their requests, whatever the process, the number of ranks or the worker."""

import io
import random

import numpy as np
import pytest
import torch
from pictures_on_disk import Pictures, picture, write_shards
from PIL import Image, ImageOps, JpegImagePlugin
from torch.utils.data import DataLoader

pytest.importorskip("braceexpand")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from data import Subset, open_source
from data.batch import Batch, Group, Request, ViewDataset, collate
from data.recipe import BICUBIC, BILINEAR, Recipe, original, recipes
from data.sampler import PartitionSampler

from ser_reg import SERError
from ser_reg.geometry import Affine
from ser_reg.images import embedded_photographs

SMALL = Recipe(4, (0.05, 0.14), BICUBIC)


def dino(local_views=0):
    """Recipes of views of 16 pixels and local ones of 8, as DINO has them."""
    return recipes(16, (0.4 if local_views else 0.14, 1), BICUBIC, 8, local_views, (0.05, 0.4))


def moco_v3(local_views=0):
    return recipes(16, (0.08, 1), BILINEAR, 8, local_views)


def batches(source, workers=0, whole=True, extra=(), term=4, **sampling):
    sampler = PartitionSampler(len(source), 12, term, **sampling)
    dataset = ViewDataset(source, *dino(local_views=2), extra, whole)
    return list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers))


def rows(group):
    """For each image of a group, all numbers of its views."""
    parts = [*group.images, *(relation.matrix for relation in group.relations)]
    parts += [part for view in group.extra for part in (view.images, view.relation.matrix)]
    return [[part[i] for part in parts] for i in range(len(group.images[0]))]


def by_position(*parts):
    """{place in the global batch: (index, numbers of its views)} of batches of one or of several ranks."""
    found = {}
    for batch in parts:
        images = rows(batch.term) + rows(batch.plain)
        assert len(images) == len(batch.positions) == len(batch.indices)
        for place, index, numbers in zip(batch.positions.tolist(), batch.indices.tolist(), images, strict=True):
            assert place not in found
            found[place] = index, numbers
    return found


def same(a, b):
    """Whether two batches, or two lists of parts of one, hold the same images with the same views."""
    ours, theirs = (by_position(*batch) if isinstance(batch, list) else by_position(batch) for batch in (a, b))
    return ours.keys() == theirs.keys() and all(
        ours[place][0] == theirs[place][0] and all(map(torch.equal, ours[place][1], theirs[place][1])) for place in ours
    )


def test_batch_has_both_groups():
    (batch, *_) = batches(Pictures())
    assert [t.shape for t in batch.plain.images] == [(8, 3, 16, 16)] * 2 + [(8, 3, 8, 8)] * 2
    assert [t.shape for t in batch.term.images] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 2
    for group in batch[:2]:
        assert {t.dtype for t in group.images} == {torch.uint8}
        assert all(t.is_contiguous() for t in group.images)
        assert [len(relation) for relation in group.relations] == [len(group.images[0])] * 4
        for view, images, relation in zip(group.views, group.images, group.relations, strict=True):
            assert (view.images, view.relation, view.drawn) == (images, relation, {})
        assert not group.extra
    assert len(batch.indices.unique()) == 12
    assert batch.positions.tolist() == [*range(12)]
    assert Group([torch.zeros(1, 3, 8, 8)]).views[0].relation is None


def test_the_terms_images_come_first():
    samples = [ViewDataset(Pictures(), dino()[0])[Request(i, i in (3, 9), 0, 10 * i)] for i in (5, 3, 8, 9)]
    batch = collate(samples)
    assert batch.indices.tolist() == [3, 9, 5, 8]
    assert batch.positions.tolist() == [30, 90, 50, 80]
    for n, group in ((2, batch.term), (2, batch.plain)):
        assert [len(images) for images in group.images] == [n, n]


def test_whole_images_are_neither_cropped_nor_flipped():
    image = picture(4, (90, 60))

    class One(Pictures):
        def image(self, i, reduction=None):
            return image

    dataset = ViewDataset(One(), *moco_v3(local_views=1))  # whose crops are bilinear
    batch = collate([dataset[Request(0, True, seed)] for seed in range(6)])
    for view in batch.term.views:
        side = view.images.shape[-1]
        resized = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(view.images.permute(0, 2, 3, 1).numpy() - resized).mean() < 0.4
        assert view.relation == Affine.identity(6)
    assert torch.equal(batch.term.images[0], batch.term.images[1])


def test_relations_say_where_crops_are():
    """Of an image whose pixels say where they are, read off its views to a fifth of a pixel."""
    height, width, size = 180, 250, 12

    class Places(Pictures):
        def image(self, i, reduction=None):
            y, x = np.mgrid[:height, :width]
            return Image.fromarray(np.stack([y, x, 0 * x], -1).astype(np.uint8))

    extra = [original(size), Recipe(size, (0.05, 0.14), BICUBIC)]
    dataset = ViewDataset(Places(), *recipes(size, (0.08, 1), BILINEAR, 8, 1), extra, whole=False)
    batch = collate([dataset[Request(i, True, i)] for i in range(30)])
    views = [*batch.term.views, *batch.term.extra]
    assert [view.images.shape[-1] for view in views] == [size, size, 8, size, size]
    for number, view in enumerate(views):
        n = view.images.shape[-1]
        at = (2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1
        there = torch.stack([*torch.meshgrid(at, at, indexing="ij"), torch.ones(n, n, dtype=torch.float64)])
        seen = torch.einsum("bij,jhw->bihw", (~view.relation).matrix, there)[:, :2]
        sides = torch.tensor([height, width])[:, None, None]
        expected = ((seen + 1) * sides - 1) / 2
        pixel = view.relation.box[:, 2:, None, None] * sides / n
        difference = (view.images[:, :2] - expected) / pixel
        assert difference.abs().max() < 0.2 + 0.5 / pixel.min()  # values are whole numbers
        flips = view.relation.flip.float().mean()
        assert flips == 0 if number == 3 else 0.2 < flips < 0.8
        assert (view.relation.turns == 0).all()
        whole = view.relation.box * torch.tensor([height, width, height, width])
        assert (whole - whole.round()).abs().max() < 1e-9


@pytest.mark.parametrize("term", [False, True])
def test_empty_groups_have_no_rows(term):
    dataset = ViewDataset(Pictures(), *dino(local_views=3), [SMALL], whole=False)
    batch = collate([dataset[Request(i, term, i)] for i in range(4)])
    for group, n in zip((batch.plain, batch.term), (0, 4) if term else (4, 0), strict=True):
        assert [t.shape for t in group.images] == [(n, 3, 16, 16)] * 2 + [(n, 3, 8, 8)] * 3
        assert {t.dtype for t in group.images} == {torch.uint8}
        assert [len(relation) for relation in group.relations] == [n] * 5
    (extra,) = batch.term.extra
    assert (extra.images.shape, extra.images.dtype) == ((4 * term, 3, 4, 4), torch.uint8)
    assert len(extra.relation) == 4 * term
    assert not batch.plain.extra
    only_global = collate([ViewDataset(Pictures(), dino()[0])[Request(0, term, 0)]])
    assert [len(group.images) for group in only_global[:2]] == [2, 2]


def test_views_are_a_function_of_the_request():
    views, local_views = moco_v3(local_views=1)
    dataset = ViewDataset(Pictures(), views, local_views)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    a = dataset[Request(3, False, 7)]
    other = dataset[Request(3, False, 8)]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    b = dataset[Request(3, False, 7, position=5)]
    assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    assert np.array_equal(a.relations, b.relations)
    assert not torch.equal(a.images[0], other.images[0])
    assert not torch.equal(a.images[0], a.images[1])


def test_all_views_of_an_image_are_drawn_independently():
    """By the same recipe, which from one seed would draw the same."""
    (recipe, _), (local, *_) = dino(local_views=1)
    dataset = ViewDataset(Pictures(), [recipe] * 2, [local] * 2, [recipe], whole=False)
    boxes = np.array([dataset[Request(seed, True, seed)].relations for seed in range(200)])
    assert boxes.shape == (200, 5, 5)
    for a in range(5):
        for b in range(a):
            assert (boxes[:, a, :4] != boxes[:, b, :4]).any(1).mean() > 0.9
            assert 0.3 < (boxes[:, a, 4] == boxes[:, b, 4]).mean() < 0.7


def test_what_is_made_for_the_term_changes_no_other_view():
    views, local_views = moco_v3(local_views=1)
    plain = ViewDataset(Pictures(), views, local_views)
    for extra in ([], [original(16)], [SMALL, original(16)]):
        beside = ViewDataset(Pictures(), views, local_views, extra, whole=False)
        for seed in range(5):
            alone = plain[Request(seed, False, seed)]
            for term in (False, True):
                sample = beside[Request(seed, term, seed)]
                assert all(map(torch.equal, alone.images, sample.images))
                assert np.array_equal(alone.relations, sample.relations[:3])
                assert [len(images) for images in sample.extra] == [3 * term] * len(extra)
    small, seen_whole = (ViewDataset(Pictures(), views, (), [SMALL], whole)[Request(1, True, 1)] for whole in (0, 1))
    assert torch.equal(small.extra[0], seen_whole.extra[0])
    assert not torch.equal(small.images[0], seen_whole.images[0])


def test_number_of_workers_changes_nothing():
    ours, theirs = (batches(Pictures(broken=(7,)), workers, extra=[SMALL]) for workers in (0, 2))
    assert len(ours) == len(theirs) == 3
    assert all(map(same, ours, theirs))
    assert [batch.unreadable for batch in ours] == [batch.unreadable for batch in theirs]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("whole", [False, True])
def test_number_of_ranks_changes_nothing(world_size, whole):
    settings = {"whole": whole, "extra": () if whole else [SMALL], "last": 4}
    alone = batches(Pictures(), **settings)
    ranks = [batches(Pictures(), rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        parts = [rank[number] for rank in ranks]
        assert {len(part.indices) for part in parts} == {12 // world_size}
        read = [len(part.term.images[0]) for part in parts]
        assert sum(read) == 4
        assert max(read) - min(read) <= 1
        assert same([batch], parts)


@pytest.mark.parametrize(("world_size", "term"), [(1, 4), (2, 4), (3, 6), (3, 12), (2, 0)])
def test_pairs_share_boxes_and_stay_neighbours(world_size, term):
    alone = batches(Pictures(), whole=False, term=term, paired=True)
    unpaired = batches(Pictures(), whole=False, term=term)
    ranks = [
        batches(Pictures(), whole=False, term=term, paired=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    flips, others = [], []
    for number, batch in enumerate(alone):
        parts = [rank[number] for rank in ranks]
        assert same([batch], parts)
        assert torch.equal(batch.indices, unpaired[number].indices)
        assert all(map(torch.equal, batch.plain.images, unpaired[number].plain.images))
        for part in parts:
            assert len(part.term.images[0]) == term // world_size
            assert len(part.indices) == 12 // world_size
            assert (part.positions[::2] % 2 == 0).all()
            assert torch.equal(part.positions[1::2], part.positions[::2] + 1)
            for relation in part.term.relations:
                assert torch.equal(relation.box[::2], relation.box[1::2])
                others += (relation.box[::2] == relation.box[::2].roll(1, 0)).all(1).tolist() * (len(relation) > 2)
                flips += (relation.flip[::2] == relation.flip[1::2]).tolist()
    assert np.mean(others or [0]) < 0.3  # in pictures of so few pixels two boxes may be the same
    assert not term or 0.2 < np.mean(flips) < 0.8


def test_training_goes_on_where_it_stopped():
    whole_run = batches(Pictures(), last=8)
    resumed = batches(Pictures(), first=5, last=8)
    assert len(resumed) == 3
    assert all(map(same, whole_run[5:], resumed))


def test_unreadable_images_are_replaced_and_named():
    views, _ = dino()
    dataset = ViewDataset(Pictures(10, broken=(8, 9, 0)), views)
    sample = dataset[Request(8, True, 5, 2)]
    assert sample.index == 1
    assert sample.unreadable == ["picture 8", "picture 9", "picture 0"]
    assert all(torch.equal(x, y) for x, y in zip(sample.images, dataset[Request(1, True, 5)].images, strict=True))
    batch = collate([sample, dataset[Request(2, True, 5, 4)], dataset[Request(9, False, 6, 6)]])
    assert batch.unreadable == ["picture 8", "picture 9", "picture 0", "picture 9", "picture 0"]
    assert batch.indices.tolist() == [1, 2, 1]
    assert batch.positions.tolist() == [2, 4, 6]


@pytest.mark.parametrize(("n", "tried"), [(3, 3), (300, 100)])
def test_nothing_but_unreadable_images_is_an_error(n, tried):
    dataset = ViewDataset(Pictures(n, broken=range(n)), dino()[0])
    with pytest.raises(SERError, match=f"{tried} unreadable images in a row, from picture 1\n"):
        dataset[Request(1, False, 0)]


def test_batch_survives_pinning(monkeypatch):
    """What the pinning thread does to a batch, without a GPU to pin it for."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self.clone())
    batch = batches(Pictures(broken=(3,)), extra=[SMALL])[0]
    pinned = pin_memory(batch)
    assert type(pinned) is Batch
    assert same(batch, pinned)
    assert batch.unreadable == pinned.unreadable


# Files


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A source of photographs as JPEG files, one after another as it is and turned by its EXIF orientation."""
    folder = tmp_path_factory.mktemp("photographs")
    found = embedded_photographs()
    for number, name in enumerate(("chelsea", "coffee", "china.jpg")):
        image = Image.fromarray(found[name].permute(1, 2, 0).numpy())
        image = image.crop((0, 0, image.width // 8 * 8 - 3, image.height // 8 * 8 - 5))
        image.save(folder / f"{2 * number}.jpg", quality=92)
        turned = Image.Exif()
        turned[0x0112] = 6  # as a camera writes that was held upright
        upright = Image.open(folder / f"{2 * number}.jpg").transpose(Image.Transpose.ROTATE_90)
        upright.save(folder / f"{2 * number + 1}.jpg", quality=92, exif=turned)
    return open_source(str(folder), "train")


class Decoded:
    """A source of which all images are decoded whole."""

    def __init__(self, source):
        self.source, self.name, self.label = source, source.name, source.label

    def __len__(self):
        return len(self.source)

    def image(self, i, reduction=None):
        return self.source.image(i)


@pytest.mark.parametrize("whole", [False, True])
def test_jpegs_are_scaled_while_they_are_decoded_where_all_views_allow_it(photographs, whole, monkeypatch):
    asked = []
    draft = JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile, "draft", lambda self, mode, size: asked.append(draft(self, mode, size))
    )
    views, local_views = recipes(24, (0.3, 1), BICUBIC, 12, 2, (0.1, 0.25))
    scaled, plain = (ViewDataset(source, views, local_views) for source in (photographs, Decoded(photographs)))
    for index in range(6):
        for seed in range(4):
            request = Request(index, whole, seed)
            a, b = scaled[request], plain[request]
            assert np.array_equal(a.relations, b.relations)
            for x, y in zip(a.images, b.images, strict=True):
                assert (x.int() - y.int()).abs().float().mean() <= 2
    assert bool(asked) is not whole  # sides that no scale divides: a whole image would be off at its edge
    large = ViewDataset(photographs, recipes(200, (0.3, 1), BICUBIC)[0])
    asked.clear()
    assert np.array_equal(
        large[Request(0, False, 1)].images,
        ViewDataset(Decoded(photographs), large.recipes)[Request(0, False, 1)].images,
    )
    assert not asked


def test_turned_jpegs_are_seen_upright(photographs):
    for index in (0, 2, 4):
        upright, turned = (
            ViewDataset(photographs, recipes(24, (0.1, 1), BICUBIC)[0])[Request(i, False, 3)]
            for i in (index, index + 1)
        )
        assert np.array_equal(upright.relations, turned.relations)
        for a, b in zip(upright.images, turned.images, strict=True):
            assert (a.int() - b.int()).abs().float().mean() <= 3  # decoded scaled, and encoded once more


def test_an_unreadable_jpeg_of_another_size_leaves_no_trace(tmp_path, photographs):
    file = io.BytesIO()
    ImageOps.mirror(Image.new("RGB", (900, 50))).save(file, "JPEG")
    (tmp_path / "0.jpg").write_bytes(file.getvalue()[:-200])
    picture(1, (64, 48)).save(tmp_path / "1.png")
    source, views = open_source(str(tmp_path), "train"), moco_v3()[0]
    found, expected = ViewDataset(source, views)[Request(0, False, 1)], ViewDataset(source, views)[Request(1, False, 1)]
    assert found.unreadable == [str(tmp_path / "0.jpg")]
    assert np.array_equal(found.relations, expected.relations)
    assert all(map(torch.equal, found.images, expected.images))

    class Mute(Subset):
        """Asks nothing once it has found a file broken."""

        def image(self, i, reduction=None):
            return self.source.image(self.indices[i], reduction if i == 0 else None)

    assert all(map(torch.equal, ViewDataset(Mute(source, [0, 1]), views)[Request(0, False, 1)].images, expected.images))


@pytest.mark.slow
def test_workers_of_another_kind_read_the_same(tmp_path):
    source = open_source(f"wds:{write_shards(tmp_path, shards=4)}/train-*.tar", "train")
    dataset = ViewDataset(source, moco_v3()[0], extra_views=[SMALL], whole=False)
    sampler = PartitionSampler(len(source), 4, 2)
    loaders = [
        DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=n, multiprocessing_context=context)
        for n, context in ((0, None), (2, "fork"), (2, "spawn"))
    ]
    ours, *others = (list(loader) for loader in loaders)
    assert len(ours) == 3
    assert all(same(a, b) for theirs in others for a, b in zip(ours, theirs, strict=True))
