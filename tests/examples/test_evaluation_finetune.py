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
