from .metadata import metadata_of as metadata_of
from .opening import seed_for as seed_for
