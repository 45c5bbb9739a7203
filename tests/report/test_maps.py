"""Token maps as colours."""

import torch

from ser_reg.report.maps import colours


def test_equal_tokens_have_equal_colours():
    maps = [torch.randn(8, 4, 5), torch.randn(8, 6, 3)]
    first, second, again = colours([*maps, maps[0]])
    assert first.shape == (3, 4, 5)
    assert second.shape == (3, 6, 3)
    torch.testing.assert_close(first, again)
    assert 0 <= first.min() < first.max() <= 1


def test_constant_maps_have_a_colour():
    assert torch.isfinite(colours([torch.zeros(8, 2, 2)] * 2)[0]).all()
