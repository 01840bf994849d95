from .load import load_sae as load_sae
from .sae import SAE as SAE
