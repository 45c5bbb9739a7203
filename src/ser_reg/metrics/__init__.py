"""What a model is asked: how its tokens follow when an image moves."""

from .base import transformations
from .equivariance import equivariance_score
from .matching import matching_score

__all__ = ["equivariance_score", "matching_score", "transformations"]
