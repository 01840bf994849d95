from .data import Effects as Effects
from .data import Look as Look
from .data import feature_data as feature_data
from .data import index_data as index_data
from .data import sae_data as sae_data
from .page import page_data as page_data
from .page import page_html as page_html
