"""What a model is asked: how its tokens follow when an image moves."""

from .equivariance import equivariance_score, transformations

__all__ = ["equivariance_score", "transformations"]
