from .splicing import spliced_losses as spliced_losses
from .variance import Reconstruction as Reconstruction
from .variance import variance_metrics as variance_metrics
