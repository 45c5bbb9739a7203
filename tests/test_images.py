"""Images from disk: folders of them, the photographs that come with two packages, and patches of either."""

import os

import pytest
import torch
from PIL import Image

from ser_reg import SERError
from ser_reg.images import cut, embedded_photographs, load_patches, read_folder, read_image
from ser_reg.images.patches import _split_in_space

# Folders


def save_noise(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(height * width))
    Image.fromarray((noise * 255).byte().numpy()).save(path)


def test_folder_at_any_depth_with_broken_ones(tmp_path):
    save_noise(tmp_path / "a.png", 20, 30)
    save_noise(tmp_path / "deep" / "er" / "b.JPG", 30, 20)
    save_noise(tmp_path / ".hidden" / "c.png", 20, 20)
    (tmp_path / "deep" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "deep" / "er" / "b.JPG").read_bytes()[:300])
    (tmp_path / "notes.txt").write_text("not an image")
    images, unreadable = read_folder(tmp_path, 64)
    assert list(images) == ["a.png", os.path.join("deep", "er", "b.JPG")]
    assert images["a.png"].shape == (3, 20, 30)
    assert list(unreadable) == ["cut.jpg", os.path.join("deep", "broken.png")]
    assert all(unreadable.values())


def test_broken_ones_are_replaced(tmp_path):
    for i in range(6):
        save_noise(tmp_path / f"{i}.png", 8, 8)
        (tmp_path / f"{i}.jpg").write_bytes(b"no")
    for seed in range(4):
        assert len(read_folder(tmp_path, 6, seed)[0]) == 6


def test_errors_of_a_folder_are_the_callers(tmp_path):
    save_noise(tmp_path / "a.png", 8, 8)
    with pytest.raises(SERError) as error:
        read_folder(tmp_path, 8)
    assert error.value.args == (
        f"read_folder({str(tmp_path)!r})",
        "1 readable of 1 files with the ending of an image",
        "at least 2 images that can be read",
        "read_folder('FOLDER', 64)  # FOLDER/*.jpg, or in folders inside",
    )
    with pytest.raises(SERError) as error:
        read_folder(tmp_path / "nowhere", 8, call="mine(folder)", remedy="mine('other')")
    assert error.value.args == ("mine(folder)", "no such folder", "a folder of images", "mine('other')")
    save_noise(tmp_path / "b.png", 8, 8)
    assert len(read_folder(tmp_path, 8)[0]) == 2
    with pytest.raises(SERError, match="at least 3 images"):
        read_folder(tmp_path, 8, fewest=3)


# Parts


@pytest.mark.parametrize("size", [(10, 10), (20, 10), (10, 30)])
def test_a_cut_is_the_largest_part_of_this_shape(size):
    """Of a picture of coordinates: its borders are those of the part, which is centred."""
    rows, columns = torch.meshgrid(torch.arange(60.0), torch.arange(90.0), indexing="ij")
    image = torch.stack([rows, columns, 0 * rows]) / 90
    part = cut(image, size)
    assert part.shape == (3, *size)
    unit = min(60 / size[0], 90 / size[1])
    for channel, (sides, length) in enumerate(zip(size, (60, 90), strict=True)):
        line = part[channel].mean(1 - channel) * 90
        assert line.mean() == pytest.approx((length - 1) / 2, abs=0.6)
        assert line[-1] - line[0] == pytest.approx(unit * (sides - 1), abs=0.6)


def test_a_cut_lies_where_it_is_told():
    image = torch.arange(100.0).expand(3, 40, 100) / 100
    left, right = (cut(image, (8, 8), 0.5, 0.5, where).mean() for where in (0.0, 1.0))
    assert left == pytest.approx(0.095, abs=0.01)
    assert right == pytest.approx(0.895, abs=0.01)
    assert torch.equal(cut((image * 255).byte(), (8, 8)), cut((image * 255).byte().float() / 255, (8, 8)))


# Patches


def save(path, height, width, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


def test_all_photographs_come_with_the_packages():
    photographs = embedded_photographs()
    assert len(photographs) == 20
    for name, photograph in photographs.items():
        assert photograph.shape[0] == 3, name
        assert photograph.dtype == torch.uint8, name
        assert photograph.float().std() > 5, f"{name} is empty"


@pytest.mark.parametrize("size", [(7, 10), (10, 7), (512, 512), (41, 300)])
def test_split_shares_no_pixel(size):
    pixels = torch.arange(size[0] * size[1]).view(1, *size)
    train, test = (set(half.flatten().tolist()) for half in _split_in_space(pixels))
    assert not train & test
    assert len(train | test) == pixels.numel()
    assert len(train) == pytest.approx(0.7 * pixels.numel(), abs=0.51 * min(size))


def test_held_out_patches_see_nothing_of_the_training_part(tmp_path):
    for name, size in (("wide", (40, 100)), ("tall", (100, 40)), ("square", (50, 50))):
        picture = Image.new("RGB", size[::-1], "black")
        width, height = picture.size
        right = (round(0.7 * width), 0, width, height) if width >= height else (0, round(0.7 * height), width, height)
        picture.paste("white", right)
        picture.save(tmp_path / f"{name}.png")
    data = load_patches(tmp_path, image_size=12, per_photo=(30, 20), seed=0)
    assert data.train.shape == (90, 3, 12, 12)
    assert data.test.shape == (60, 3, 12, 12)
    assert data.train.max() == 0
    assert data.test.min() == 1


def test_labels_name_the_photograph(tmp_path):
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
    for name, colour in colours.items():
        save(tmp_path / f"{name}.png", 30, 40, colour)
    data = load_patches(tmp_path, image_size=8, per_photo=(4, 3), seed=0)
    assert data.names == ["a.png", "b.png", "c.png"]
    for patches, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert torch.equal(patches.mean((2, 3)).argmax(1), labels)


def test_sub_folders_are_classes_and_images_are_held_out(tmp_path):
    for label, name in enumerate(("cats", "dogs")):
        for i in range(10):
            save(tmp_path / name / f"{i}.png", 20, 30, (100 * label, 10 * i, 0))
    data = load_patches(tmp_path, image_size=8, per_photo=(1, 1), seed=0)
    assert data.names == ["cats", "dogs"]
    assert (len(data.train), len(data.test)) == (14, 6)
    images = {tuple((255 * x).round().int().tolist()) for x in data.train[:, :, 0, 0]}
    held_out = {tuple((255 * x).round().int().tolist()) for x in data.test[:, :, 0, 0]}
    assert not images & held_out
    assert len(images | held_out) == 20
    assert torch.equal(data.test[:, 0, 0, 0] > 0.2, data.test_labels == 1)


def test_same_seed_same_patches(tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    save(tmp_path / "a.png", 30, 40, "red")
    Image.effect_noise((60, 50), 80).save(tmp_path / "b.png")
    first, second, other = (load_patches(tmp_path, 8, (5, 5), seed) for seed in (0, 0, 1))
    assert torch.equal(first.train, second.train)
    assert not torch.equal(first.train, other.train)
    assert torch.equal(torch.get_rng_state(), state)


# What goes wrong

REMEDY = "python examples/quickstart.py --images FOLDER  # FOLDER/*.jpg, or FOLDER/CLASS/*.jpg"


def test_missing_folder_says_so(tmp_path):
    folder = tmp_path / "nowhere"
    with pytest.raises(SERError) as error:
        load_patches(folder, 8, (1, 1), 0)
    assert str(error.value) == (
        f"load_patches({str(folder)!r})\n"
        "  given:    no such folder\n"
        "  expected: a folder of images\n"
        f"  remedy:   {REMEDY}"
    )


def test_useless_folders_say_so(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(SERError, match="no image in it"):
        load_patches(tmp_path, 8, (1, 1), 0)
    save(tmp_path / "a.png", 30, 40, "red")
    with pytest.raises(SERError, match=r"only \['a.png'\]"):
        load_patches(tmp_path, 8, (1, 1), 0)
    save(tmp_path / "b.png", 5, 40, "red")
    with pytest.raises(SERError, match=r"b.png of 5 pixels a side"):
        load_patches(tmp_path, 8, (1, 1), 0)
    (tmp_path / "b.png").unlink()
    save(tmp_path / "sub" / "b.png", 30, 40, "red")
    with pytest.raises(SERError, match="1 images in the folder itself and sub-folders"):
        load_patches(tmp_path, 8, (1, 1), 0)
    (tmp_path / "a.png").unlink()
    save(tmp_path / "other" / "c.png", 30, 40, "red")
    with pytest.raises(SERError, match="one image in class 'other'"):
        load_patches(tmp_path, 8, (1, 1), 0)


def test_unreadable_image_is_named(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"not a picture")
    with pytest.raises(SERError, match="an image that Pillow can read") as error:
        read_image(path)
    assert str(path) in str(error.value)
