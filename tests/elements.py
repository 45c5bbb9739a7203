"""Group elements for the tests: hypothesis strategies and the eight dihedral ones."""

import torch
from hypothesis import strategies as st

from ser_reg import GroupElement

DIHEDRAL = [(turns, flip) for flip in (False, True) for turns in range(4)]


def element(turns: int, flip: bool, scale: tuple[float, float] = (1.0, 1.0), n: int = 1) -> GroupElement:
    return GroupElement(
        torch.full((n,), turns), torch.full((n,), flip), torch.tensor([scale], dtype=torch.float64).expand(n, 2)
    )


def dihedral(n: int) -> GroupElement:
    """n independent elements without scaling."""
    return GroupElement.sample(n, scale=(1, 1), ratio=(1, 1))


@st.composite
def elements(draw: st.DrawFn, n: int = 3) -> GroupElement:
    """n elements with flips and anisotropic scales."""
    turns = draw(st.lists(st.integers(-5, 9), min_size=n, max_size=n))
    flip = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    scale = draw(st.lists(st.tuples(st.floats(0.25, 4), st.floats(0.25, 4)), min_size=n, max_size=n))
    return GroupElement(torch.tensor(turns), torch.tensor(flip), torch.tensor(scale, dtype=torch.float64))
