"""What can be done to a map: the elements of the group, affine maps, and their action."""

from .action import act
from .affine import Affine
from .channels import check_channels, move_channels
from .collate import concatenate
from .elements import GroupElement
from .resize import crop_and_resize

__all__ = ["Affine", "GroupElement", "act", "check_channels", "concatenate", "crop_and_resize", "move_channels"]
