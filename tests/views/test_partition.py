"""How much of a batch goes to b2."""

import pytest

from ser_reg import SERError, partition_size


def test_partition_size_never_leaves_one_image_over_all_ranks():
    for batch in (1, 2, 3, 32, 256):
        for world in (1, 2, 8):
            for ratio in (1e-4, 0.005, 0.01, 0.02, 0.5, 1.0):
                if batch * world < 2:
                    continue
                n = partition_size(batch, ratio, world)
                assert 1 <= n <= batch
                assert n * world >= 2
                assert abs(n - batch * ratio) <= 1 or n <= 2
    assert partition_size(64, 0) == 0
    assert partition_size(64, 1.0) == 64


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((64, 1), "0.01"),
        ((64, True), "1.0 for all images"),
        ((1, 0.5), "at least two"),
        ((64, -0.1), "0 to 1"),
        ((64, 1.5), "0 to 1"),
        ((0, 0.5), "at least one of each"),
    ],
)
def test_partition_size_refuses(arguments, text):
    with pytest.raises(SERError, match=text):
        partition_size(*arguments)
