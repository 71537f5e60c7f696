"""What the type checker should know of ml_collections: a field of a config can hold anything."""

from . import config_dict as config_dict
from . import config_flags as config_flags
from .config_dict import ConfigDict as ConfigDict
from .config_dict import FieldReference as FieldReference
from .config_dict import FrozenConfigDict as FrozenConfigDict
