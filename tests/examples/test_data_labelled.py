"""Images and labels for evaluations, and those of them that cannot be read."""

from types import SimpleNamespace

import pytest
import torch
from pictures_on_disk import Pictures, picture

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from data.labelled import NO_LABEL, LabelledDataset, collate_labelled
from data.recipe import evaluation_transform, training_crop
from evaluation.features import embeddings

from ser_reg import SERError


def test_labelled_images():
    dataset = LabelledDataset(Pictures(10, broken=(4,)), evaluation_transform(16))
    assert (dataset[3].index, dataset[3].label, dataset[3].unreadable) == (3, 1, None)
    assert torch.equal(dataset[3].image, evaluation_transform(16)(picture(3)))
    _, image, label, unreadable = dataset[4]
    assert label == NO_LABEL == -1
    assert image.shape == (3, 16, 16)
    assert not image.any()
    assert unreadable == ("picture 4", "broken")


def test_batches_mark_what_is_unreadable():
    dataset = LabelledDataset(Pictures(10, broken=(4,)), evaluation_transform(16))
    batch = collate_labelled([dataset[i] for i in (3, 4, 5)])
    assert batch.indices.tolist() == [3, 4, 5]
    assert batch.labels.tolist() == [1, -1, 1]
    assert batch.readable.tolist() == [True, False, True]
    assert batch.unreadable == [("picture 4", "broken")]
    assert torch.equal(batch.images[2], dataset[5].image)


def test_crops_are_functions_of_number_and_seed():
    dataset, state = LabelledDataset(Pictures(10, broken=(4,)), training_crop(16)), torch.get_rng_state()
    one, again, other = dataset[3, 7], dataset[3, 7], dataset[3, 8]
    assert torch.equal(one.image, again.image)
    assert not torch.equal(one.image, other.image)
    assert not dataset[4, 7].image.any()
    assert torch.equal(torch.get_rng_state(), state)


class Here(SimpleNamespace):
    """What is asked of accelerate, of one process."""

    num_processes, process_index, device = 1, 0, torch.device("cpu")

    def autocast(self):
        return torch.enable_grad()

    def gather(self, x):
        return x


def test_unreadable_images_are_left_out_of_embeddings_with_a_warning():
    with pytest.warns(UserWarning, match="picture 4"):
        found, labels = embeddings(torch.nn.Flatten(), Pictures(10, broken=(4,)), 16, Here(), 0)
    whole, _ = embeddings(torch.nn.Flatten(), Pictures(10), 16, Here(), 0)
    assert torch.equal(found, whole[[0, 1, 2, 3, 5, 6, 7, 8, 9]])
    assert labels.tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 1]
    with pytest.raises(SERError, match="unlabelled images such as picture 0"):
        embeddings(torch.nn.Flatten(), Pictures(classes=()), 16, Here(), 0)
