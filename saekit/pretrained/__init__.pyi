from .load import load_sae as load_sae
from .releases import Release as Release
from .releases import ReleasedSAE as ReleasedSAE
from .releases import Releases as Releases
from .releases import read_releases as read_releases
from .sae import SAE as SAE
