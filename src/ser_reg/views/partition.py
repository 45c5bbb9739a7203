"""How much of a batch goes to b2, the subset that the added term sees."""

from ..errors import require

__all__ = ["partition_size"]


def partition_size(batch_size: int, ratio: float, world_size: int = 1) -> int:
    """How many of a rank's images go to b2, the subset of the batch that the added term sees.

    The share is the same on every rank, so r is met up to whole images a rank: of 256 images a rank, r = 0.005, 0.01
    and 0.02 give 1, 3 and 5. A positive r never gives none, nor exactly one image over all ranks: without another
    image there are no negatives, and the loss is identically zero.

    Args:
        batch_size: images of this rank.
        ratio: r, the share of the batch that goes to b2; 0 for none.
        world_size: number of ranks.

    Raises:
        SERError: r is outside [0, 1], or all ranks together do not have two images.

    Source: Section 3.2; r = 0.01 is best in Table 8.

    Example:
        >>> [partition_size(256, r, world_size=8) for r in (0, 0.005, 0.01, 0.02)]
        [0, 1, 3, 5]
        >>> partition_size(64, 0.01)
        2
    """
    call = f"partition_size(batch_size={batch_size}, ratio={ratio}, world_size={world_size})"
    expected = "a share of the batch, 0 to 1"
    # Nobody who types 1 is known to mean all images, and one image has no negatives.
    share = isinstance(ratio, float) or (ratio == 0 and not isinstance(ratio, bool))
    remedy = "partition_size(batch_size, 0.01)  # 1 %; or 1.0 for all images"
    require(share, call, f"ratio={ratio!r}, which may mean one image, 1 % or all", expected, remedy)
    require(0 <= ratio <= 1, call, f"ratio={ratio}", expected, "partition_size(batch_size, ratio=0.01)")
    given, remedy = f"{batch_size} images on {world_size} ranks", "partition_size(len(images), 0.01, world_size=1)"
    require(batch_size >= 1 and world_size >= 1, call, given, "at least one of each", remedy)
    if ratio == 0:
        return 0
    require(
        batch_size * world_size > 1,
        call,
        "one image over all ranks",
        "at least two: with one there are no negatives, and the loss is identically zero",
        f"partition_size(batch_size=2, ratio={ratio})",
    )
    return min(batch_size, max(round(batch_size * ratio), 2 if world_size == 1 else 1))
