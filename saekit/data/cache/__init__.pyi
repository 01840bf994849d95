from .manifest import Manifest as Manifest
from .manifest import verify_cache as verify_cache
from .order import RowOrder as RowOrder
from .read import CachedActivations as CachedActivations
from .read import CachedBatches as CachedBatches
from .write import CacheWriter as CacheWriter
