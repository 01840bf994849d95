from .exporting import export as export
from .exporting import formats as formats
from .load import load_sae as load_sae
from .probe import verify as verify
from .sae import SAE as SAE
