"""The one exception of the library."""

__all__ = ["SERError"]


class SERError(ValueError):
    """Input that cannot give a right number, and what to type instead.

    Args:
        call: the call as the user wrote it, with its arguments.
        given: what it got (shapes, values).
        expected: what it needs.
        remedy: a line that can be typed.

    Example:
        >>> print(SERError("act(g, x)", "len(g) is 3, x has 4 images", "one element per image", "g[:4]"))
        act(g, x)
          given:    len(g) is 3, x has 4 images
          expected: one element per image
          remedy:   g[:4]
    """

    def __init__(self, call: str, given: str, expected: str, remedy: str) -> None:
        # All four stay in `args`, so that the error survives pickling on its way out of a worker process.
        super().__init__(call, given, expected, remedy)
        self.call, self.given, self.expected, self.remedy = call, given, expected, remedy

    def __str__(self) -> str:
        return f"{self.call}\n  given:    {self.given}\n  expected: {self.expected}\n  remedy:   {self.remedy}"
