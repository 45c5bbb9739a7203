"""A torchvision pipeline with a record: the relation is what was done to the image, and the image is what it was."""

import functools
import pickle
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

from ser_reg import GroupElement, SERError, View, relation
from ser_reg.geometry import Affine
from ser_reg.views import recorded

KEYPOINTS = hasattr(tv_tensors, "KeyPoints")


def needs_points(test):
    """With a torchvision that has no key points (before 0.23) the test is that this is said."""

    @functools.wraps(test)
    def is_refused(*args, **kwargs):
        with pytest.raises(SERError, match="torchvision") as caught:
            recorded(v2.RandomHorizontalFlip())
        assert "pip install" in caught.value.remedy

    return test if KEYPOINTS else is_refused


BILINEAR = v2.InterpolationMode.BILINEAR
SIDES = st.integers(24, 80)


def coordinates(height, width):
    """(3, height, width): row and column of each place in pixels, and ones, which show where something was seen."""
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([rows, columns, torch.ones(height, width)])


def ring(image):
    """What is seen less the outermost pixels, which interpolation at an edge makes of nothing."""
    if type(image) is not torch.Tensor or image.ndim != 3:
        return image  # points and boxes
    image = image.clone()
    seen = image[2, 1:-1, 1:-1].clone()
    image[2] = 0
    image[2, 1:-1, 1:-1] = seen
    return image


def off(transforms, size):
    """How far the relation is off, place by place, in pixels of the image or of the view, whichever are larger."""
    pipeline = v2.Compose([step for each in transforms for step in (v2.Lambda(ring), each)] + [v2.Lambda(ring)])
    images, relation, drawn = recorded(pipeline)(coordinates(*size))
    assert len(relation) == 1
    assert not drawn
    expected, _ = relation.warp(coordinates(*size)[None].double(), tuple(images.shape[-2:]), mode="bilinear")
    error = (expected[0, :2] - images[:2]).permute(1, 2, 0)[images[2] > 0.9999]  # rows, columns of the image
    half = torch.tensor(size) / 2, torch.tensor(images.shape[-2:]) / 2
    in_view = (error / half[0]) @ relation.matrix[0, :2, :2].T * half[1]
    return torch.minimum(error.norm(dim=1), in_view.norm(dim=1))


@st.composite
def pipelines(draw):
    """One to five geometric transforms of torchvision, bilinear throughout, and a size to start from."""
    size = draw(SIDES), draw(SIDES)
    sides = st.tuples(SIDES, SIDES)
    resize = {"interpolation": BILINEAR, "antialias": draw(st.booleans())}
    kinds = st.one_of(
        st.just(v2.RandomHorizontalFlip()),
        st.just(v2.RandomVerticalFlip()),
        st.sampled_from([5, 45, 180]).map(lambda degrees: v2.RandomRotation(degrees, interpolation=BILINEAR)),
        st.tuples(st.sampled_from([0, 30]), st.sampled_from([None, 10])).map(
            lambda angles: v2.RandomAffine(angles[0], (0.1, 0.2), (0.7, 1.4), angles[1], interpolation=BILINEAR)
        ),
        sides.map(lambda size: v2.RandomResizedCrop(size, scale=(0.2, 1), **resize)),
        sides.map(lambda size: v2.Resize(size, **resize)),
        st.just(v2.RandomShortestSize([32, 48], max_size=80, **resize)),
        st.just(v2.ScaleJitter((64, 64), (0.5, 1.5), **resize)),
        st.lists(st.integers(0, 9), min_size=4, max_size=4).map(v2.Pad),
        st.just(v2.RandomZoomOut(side_range=(1, 2))),
        sides.map(lambda size: v2.RandomCrop(size, pad_if_needed=True)),
        st.just(v2.CenterCrop(20)),  # one larger than its image is off by up to a pixel in torchvision itself
    )
    transforms = draw(st.lists(kinds, min_size=1, max_size=5))
    return transforms, size, draw(st.integers(0, 2**32))


@needs_points
@settings(max_examples=200)
@given(pipelines())
def test_the_relation_is_what_any_pipeline_did(case):
    transforms, size, seed = case
    torch.manual_seed(seed)
    error = off(transforms, size)
    if len(error):
        assert error.mean() < 0.12  # a fifth of a pixel, inner edges of a crop before it is resized aside
        assert error.quantile(0.95) < 0.2


@needs_points
def test_a_rotation_that_expands_is_off_by_what_torchvision_is():
    for seed in range(20):
        torch.manual_seed(seed)
        error = off([v2.RandomRotation(180, interpolation=BILINEAR, expand=True)], (48, 63))
        assert error.max() < 2**0.5  # of each axis less than a pixel


@needs_points
@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (v2.Identity(), Affine.identity(1)),
        (v2.RandomHorizontalFlip(1), Affine.of(GroupElement.mirror())),
        (v2.RandomVerticalFlip(1), Affine.of(GroupElement.turn(2) @ GroupElement.mirror())),
        (v2.Resize((20, 30)), Affine.identity(1)),
        (v2.CenterCrop(20), Affine.crop(torch.tensor([[10 / 40, 20 / 60, 20 / 40, 20 / 60]]).double())),
        (v2.RandomAffine((30, 30), interpolation=BILINEAR), Affine.rotation(-30.0, (40, 60))),  # clockwise there
        (v2.RandomRotation((30, 30)), Affine.rotation(30.0, (40, 60))),
        (v2.RandomAffine(0, scale=(2, 2)), Affine.crop(torch.tensor([[0.25, 0.25, 0.5, 0.5]]).double())),
        (v2.Pad([6, 4]), Affine.crop(torch.tensor([[-0.1, -0.1, 1.2, 1.2]]).double())),
    ],
    ids=lambda value: type(value).__name__,
)
def test_known_transforms(transform, expected):
    view = recorded(transform)(torch.rand(3, 40, 60))
    assert view.relation.allclose(expected, 1e-6)


@needs_points
def test_turns_and_flips_are_read_off():
    square = torch.rand(3, 40, 40)
    for turns in range(4):
        view = recorded(v2.Compose([v2.RandomHorizontalFlip(1), v2.RandomRotation((90 * turns, 90 * turns))]))(square)
        assert (view.relation.turns.item(), view.relation.flip.item()) == (turns, True)
        torch.testing.assert_close(view.images, torch.rot90(square.flip(-1), turns, (-2, -1)))


SSL = v2.Compose(
    [
        v2.RandomResizedCrop(32, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(5)], 0.5),
        v2.RandomSolarize(128, 0.2),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.25] * 3),
        v2.RandomErasing(0.5),
    ]
)


def picture(height=50, width=64):
    return Image.fromarray((coordinates(height, width) * 3).permute(1, 2, 0).byte().numpy())


@needs_points
@pytest.mark.parametrize("pure", [False, True])
def test_images_are_those_of_the_transform_alone(pure):
    transform = v2.Compose([SSL, v2.ToPureTensor()]) if pure else SSL
    for seed in range(20):
        torch.manual_seed(seed)
        alone = transform(picture())
        after = torch.rand(3)
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            view = recorded(transform)(picture())
        assert torch.equal(after, torch.rand(3)), "it drew more or fewer numbers"
        assert type(view.images) is torch.Tensor
        assert torch.equal(view.images, alone.as_subclass(torch.Tensor))
        assert view.relation.box.shape == (1, 4)
        assert view.drawn == {}


@needs_points
def test_what_goes_in():
    crop = v2.Compose([v2.ToImage(), v2.RandomResizedCrop((20, 24), antialias=True)])
    array = coordinates(50, 64).permute(1, 2, 0).byte().numpy()
    views = []
    for image in (array, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)):
        torch.manual_seed(3)
        views.append(recorded(crop)(image))
    for view in views:
        assert view.images.dtype == torch.uint8
        assert torch.equal(view.images, views[0].images)
        assert view.relation == views[0].relation
    for call in (nn := torch.nn.Sequential(v2.CenterCrop(20), v2.ToDtype(torch.float32)), lambda sample: nn(sample)):
        assert recorded(call)(torch.rand(3, 50, 64)).relation.box[0, 2] == 20 / 50


@needs_points
def test_an_array_that_the_first_transform_would_pass_by_is_refused():
    array = coordinates(50, 64).permute(1, 2, 0).byte().numpy()
    flip = v2.Compose([v2.RandomApply([v2.RandomHorizontalFlip(1)], 1), v2.ToImage()])
    with pytest.raises(SERError, match=re.escape("an array, which v2.RandomHorizontalFlip passes by")):
        recorded(flip)(array)
    view = recorded(v2.Compose([v2.ToImage(), flip]))(array)  # the remedy
    assert view.relation.flip.all()
    assert torch.equal(view.images, torch.from_numpy(array).permute(2, 0, 1).flip(-1))


@needs_points
def test_two_crops_of_one_image_are_related():
    """What view 1 shows, moved to view 2, is what view 2 shows."""
    transform = recorded(v2.Compose([v2.RandomResizedCrop(48, (0.4, 1), interpolation=BILINEAR, antialias=False)]))
    image = coordinates(90, 120)
    compared = 0
    for _ in range(10):
        view1, view2 = transform(image), transform(image)
        batch = [View(view.images[None], view.relation, {}) for view in (view1, view2)]
        moved, valid = relation(*batch).warp(view1.images[None].double())
        inside = -torch.nn.functional.max_pool2d(-valid[:, None].double(), 7, 1, 3)[0, 0] > 0  # edges of both crops
        inside[[0, 1, 2, -3, -2, -1]] = inside[:, [0, 1, 2, -3, -2, -1]] = False
        compared += inside.sum()
        assert ((moved[0, :2] - view2.images[:2])[:, inside].abs() < 0.2).all()
    assert compared > 1000


class Pictures(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(picture()), self.transform(picture()), index


def check_loader(start):
    loader = DataLoader(Pictures(recorded(SSL)), batch_size=4, num_workers=2, multiprocessing_context=start)
    (view1, view2, labels) = next(iter(loader))
    for view in (view1, view2):
        assert isinstance(view, View)
        assert view.images.shape == (4, 3, 32, 32)
        assert view.relation.box.shape == (4, 4)
        assert view.drawn == {}
    assert not relation(view1, view2).allclose(Affine.identity(4))
    assert labels.tolist() == [0, 1, 2, 3]


@needs_points
def test_default_collate_makes_batches():
    transform = pickle.loads(pickle.dumps(recorded(SSL)))
    samples = [transform(picture()) for _ in range(3)]
    batch = default_collate(samples)
    assert isinstance(batch, View)
    assert torch.equal(batch.images, torch.stack([sample.images for sample in samples]))
    assert all(batch.relation[i] == sample.relation for i, sample in enumerate(samples))
    assert repr(transform).startswith("recorded(Compose(")
    check_loader("fork")


@needs_points
@pytest.mark.slow
def test_workers_that_are_started_anew():
    check_loader("spawn")


@needs_points
@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (v1.RandomHorizontalFlip(), "given:    RandomHorizontalFlip of torchvision.transforms,"),
        (
            v1.Compose([v2.CenterCrop(8), v1.ToTensor()]),
            "remedy:   from torchvision.transforms import v2  # v2.ToTensor",
        ),
        (v2.Compose([v2.RandomApply([v2.ElasticTransform()])]), "the pipeline without v2.ElasticTransform"),
        (v2.RandomPerspective(), "v2.RandomPerspective, which is no affine map"),
        (torch.nn.Sequential(v2.RandAugment()), "v2.RandAugment, through which no points can be sent"),
        ("RandomResizedCrop", "a str"),
        (v2.Compose([v2.ConvertBoundingBoxFormat("CXCYWH")]), "which changes the box of the record"),
        (v2.Compose([v2.Lambda(lambda x: 2 * x), v2.ToPureTensor()]), "the pipeline without v2.ToPureTensor"),
    ],
    ids=["v1", "v1 inside", "elastic", "perspective", "auto", "no transform", "box", "lambda"],
)
def test_what_cannot_be_recorded_is_refused_at_once(transform, words):
    with pytest.raises(SERError, match=re.escape(words)):
        recorded(transform)


@needs_points
@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda sample: v2.RandomPerspective(0.3, p=1)(sample), "moves points by up to"),
        (lambda sample: v2.ElasticTransform()(sample), "the pipeline without v2.RandomPerspective"),
        (lambda sample: v2.AutoAugment()(sample), "TypeError: Inputs of type"),
        (lambda image: image.mean(), "AttributeError: 'tuple' object has no attribute 'mean'"),
        (lambda sample: [v2.CenterCrop(8)(sample)] * 2, "TwoCrops(recorded(transform))"),
        (lambda sample: sample[0], "a Tensor from the transform"),
        (lambda sample: (sample[0][:, ::2], *sample[1:]), "its key points on (40, 60)"),
        (
            lambda sample: (*sample[:2], sample[2].repeat(2, 1)),
            "transform of Tensor, KeyPoints, Tensor",
        ),
        (v2.ToPILImage(), "v2.ToImage(), v2.ToDtype(torch.float32, scale=True)"),
        (v2.Compose([v2.CenterCrop(20), v2.Lambda(lambda x: x * 2 - 1)]), "a function took them for an image"),
        (lambda sample: v2.ClampBoundingBoxes("hard")(v2.CenterCrop(20)(sample)), "a box of [20.0, 20.0]"),
        (v2.RandomCrop(32, padding=4, padding_mode="reflect"), 'remedy:   padding_mode="constant"'),
    ],
    ids=[
        *("perspective", "elastic", "auto", "raises", "two", "alone", "points left", "boxes", "PIL"),
        *("points as images", "box clamped", "reflect"),
    ],
)
def test_what_cannot_be_recorded_is_refused(transform, words):
    with pytest.raises(SERError, match=re.escape(words)):
        recorded(transform)(torch.rand(3, 40, 60))


@needs_points
def test_what_is_no_image_is_refused():
    for image, words in ((torch.rand(2, 3, 8, 8), "one image (C, H, W)"), ("cat.jpg", "a str")):
        with pytest.raises(SERError, match=re.escape(words)):
            recorded(v2.CenterCrop(4))(image)
    broken = recorded(lambda sample: Image.open("not there.jpg"))
    with pytest.raises(FileNotFoundError):  # of a file, and no word on the transform
        broken(torch.rand(3, 8, 8))


@needs_points
def test_albumentations_are_refused():
    kind = type("HorizontalFlip", (), {"__module__": "albumentations.augmentations", "__call__": lambda self, x: x})
    with pytest.raises(SERError, match="HorizontalFlip of Albumentations"):
        recorded(kind())


def test_an_old_torchvision_is_refused(monkeypatch):
    if KEYPOINTS:
        monkeypatch.delattr(tv_tensors, "KeyPoints")
    with pytest.raises(SERError, match=re.escape('pip install "torchvision>=0.23"')):
        recorded(v2.CenterCrop(4))
