from .opening import seed_for as seed_for
from .setup import metadata_of as metadata_of
