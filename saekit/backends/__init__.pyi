from .around import LoadedModel as LoadedModel
from .base import Backend as Backend
from .forward import Hooks as Hooks
from .forward import next_token_loss as next_token_loss
from .inside import InsideBackend as InsideBackend
from .loading import is_wrapper_of_compile as is_wrapper_of_compile
from .loading import wrong_model as wrong_model
from .modules import ModuleBackend as ModuleBackend
