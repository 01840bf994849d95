from .feature import Feature as Feature
from .feature import Histogram as Histogram
from .feature import Logits as Logits
from .feature import Partner as Partner
from .store import FeatureStore as FeatureStore
from .store import SAEFeatures as SAEFeatures
from .windows import Quantile as Quantile
from .windows import Window as Window
