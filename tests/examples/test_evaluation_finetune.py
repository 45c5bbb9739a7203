"""Random crops that do not depend on the number of processes, and fine-tuning that goes on where it was stopped."""

from types import SimpleNamespace

import pytest
import torch
from encoder_to_judge import LATE

for package in ("accelerate", "matplotlib", "rich", "skimage", "sklearn", "torchvision", "tyro"):
    pytest.importorskip(package)

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from data import open_source  # noqa: E402
from evaluation import encoder  # noqa: E402
from evaluation.checkpoint import EpochCheckpoint  # noqa: E402
from evaluation.crops import Crops  # noqa: E402
from evaluation.finetune import Training, classifier, finetune  # noqa: E402

from ser_reg import SERError  # noqa: E402
from ser_reg.backbones import backbone  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _accelerate_begins_anew():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_crops_do_not_depend_on_the_number_of_processes(folder):
    source = open_source(str(folder), "train")

    def drawn(rank, world, epoch):
        accelerator = SimpleNamespace(num_processes=world, process_index=rank, device=CPU)
        return list(Crops(accelerator, source, list(range(50)), 16, 12, 0, 0)(epoch))

    alone, parts, later = drawn(0, 1, 0), [drawn(rank, 2, 0) for rank in (0, 1)], drawn(0, 1, 1)
    assert len(alone) == 4
    for whole, *halves in zip(alone, *parts, strict=True):
        assert torch.equal(whole[0], torch.cat([images for images, _ in halves]))
        assert torch.equal(whole[1], torch.cat([labels for _, labels in halves]))
    assert not torch.equal(alone[0][0], later[0][0])
    assert torch.cat([labels for _, labels in alone]).bincount().min() > 5


@pytest.mark.parametrize("stop", [0, 1])
def test_finetuning_goes_on_where_it_was_stopped(exported, folder, tmp_path, stop):
    accelerator, made, source = Accelerator(cpu=True), encoder.load(str(exported)), open_source(str(folder), "train")
    images = Crops(accelerator, source, list(range(60)), 32, 30, 0, 0)
    recipe = Training(2, 0.5, 1e-3, 0.05, 0.75, 0.1)

    def trained(name, show=lambda epoch: None, **key):
        progress = EpochCheckpoint(tmp_path / f"{name}.progress", key, writes=True)
        return finetune(accelerator, made, classifier(made, 3, 0), images, recipe, progress, show).state_dict()

    def interrupt(epoch):
        if epoch == stop:
            raise KeyboardInterrupt

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", interrupt)
    again = trained("stopped")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    start = classifier(made, 3, 0)
    assert backbone(start).cls_layer == LATE
    moved = {name for name, value in start.state_dict().items() if not torch.equal(value, whole[name])}
    assert moved == set(whole)  # the whole network is trained
    EpochCheckpoint(tmp_path / "rate.progress", {"rate": 3}, writes=True).save({})
    with pytest.raises(SERError, match="a training with rate 3") as error:
        EpochCheckpoint(tmp_path / "rate.progress", {"rate": 1}, writes=True).load()
    assert "rm '" in error.value.remedy


def test_every_epoch_has_crops_and_an_order_of_its_own(folder):
    source, seen = open_source(str(folder), "train"), []

    class Watched:
        classes = source.classes

        def __getattr__(self, name):
            return getattr(source, name)

        def __len__(self):
            return len(source)

        def image(self, i, reduction=None):
            seen.append(i)
            return source.image(i)

    crops = Crops(Accelerator(cpu=True), Watched(), list(range(60)), 16, 20, 0, 0)
    epochs = []
    for epoch in range(3):
        seen.clear()
        images = torch.cat([images for images, _ in crops(epoch)])
        assert sorted(seen) == list(range(60))  # each image once
        epochs.append((list(seen), images[torch.tensor(seen).argsort()]))
    assert len({tuple(order) for order, _ in epochs}) == 3
    assert not torch.equal(epochs[0][1], epochs[1][1])


class OneBatch:
    """The same images in every step, for `finetune`."""

    steps = 1

    def __init__(self, images, labels):
        self.batch = images, labels

    def __call__(self, epoch):
        yield self.batch


def trained(made, model, batches, path, **changes):
    training = Training(1, 0.0, 1e-2, 0.0, 1.0, 0.0)._replace(**changes)
    return finetune(Accelerator(cpu=True), made, model, batches, training, EpochCheckpoint(path, {}, writes=False))


def test_rates_decay_from_layer_to_layer(exported, tmp_path):
    made = encoder.load(str(exported))
    start = classifier(made, 3, 0)
    torch.nn.init.normal_(start.get_classifier().weight)
    before = [p.clone() for p in start.parameters()]
    batch = OneBatch(torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6) % 3)
    # Adam's first step is as long as the rate, whatever the gradient is; the second and last has rate 0.
    model = trained(made, start, batch, tmp_path / "none", epochs=2, layer_decay=0.5)
    moved = {
        name: float((p - q).detach().abs().max()) for (name, p), q in zip(model.named_parameters(), before, strict=True)
    }
    blocks = torch.tensor([moved[f"blocks.{i}.mlp.fc1.weight"] for i in range(4)])
    torch.testing.assert_close(blocks[:-1] / blocks[1:], torch.full((3,), 0.5), rtol=1e-2, atol=0)
    assert moved["blocks.0.mlp.fc1.weight"] / moved["patch_embed.proj.weight"] == pytest.approx(2, rel=1e-2)
    assert moved["head.weight"] > blocks[-1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_smoothed_labels_are_what_is_learnt(exported, tmp_path, smoothing):
    made, images = encoder.load(str(exported)), torch.zeros(3, 3, 1, 1, dtype=torch.uint8)
    for i in range(3):
        images[i, i] = 255
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 3))
    batch = OneBatch(images, torch.arange(3))
    model = trained(made, model, batch, tmp_path / "none", epochs=400, rate=0.1, label_smoothing=smoothing)
    right = model(made.normalise(images)).softmax(1).diagonal()
    torch.testing.assert_close(right, torch.full((3,), 1 - smoothing * 2 / 3), atol=5e-3, rtol=0)


def test_rates_rise_and_fall_and_images_are_normalised(exported, folder, tmp_path, monkeypatch):
    made, source, rates, pixels = encoder.load(str(exported)), open_source(str(folder), "train"), [], []
    step = torch.optim.AdamW.step

    def watched(self, closure=None):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    model = classifier(made, 3, 0)
    model.register_forward_pre_hook(lambda module, inputs: pixels.append(inputs[0]))
    crops = Crops(Accelerator(cpu=True), source, list(range(60)), 32, 12, 0, 0)
    trained(made, model, crops, tmp_path / "none", epochs=4, warmup_epochs=1.0, rate=1e-3)
    found = torch.tensor(rates, dtype=torch.float64)
    assert found.shape[0] == 20  # five steps in each of four epochs
    assert (found == found[:, :1]).all()  # without a decay, one rate for all layers
    rise, fall = found[:5, 0], found[4:, 0]
    torch.testing.assert_close(rise, 1e-3 * torch.arange(1, 6).double() / 5)
    torch.testing.assert_close(
        fall, 1e-3 * (1 + torch.cos(torch.pi * torch.arange(16).double() / 15)) / 2, atol=1e-12, rtol=0
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (made.mean, made.std))
    stored = (torch.cat(pixels) * std + mean) * 255  # bytes, as they were on disk
    torch.testing.assert_close(stored, stored.round(), atol=1e-3, rtol=0)
    assert stored.min() > -0.5
    assert 200 < stored.max() < 255.5
