from .files import PretrainedSAE as PretrainedSAE
from .files import SAEFiles as SAEFiles
from .load import load_sae as load_sae
