from .base import Backend as Backend
from .forward import Hooks as Hooks
from .forward import next_token_loss as next_token_loss
from .inside import InsideBackend as InsideBackend
from .loading import wrong_model as wrong_model
from .modules import ModuleBackend as ModuleBackend
