from .exporting import export as export
from .exporting import formats as formats
from .load import load_sae as load_sae
from .sae import SAE as SAE
