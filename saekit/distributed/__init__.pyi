from . import costs as costs
from .group import Group as Group
from .share import WHOLE as WHOLE
from .share import Share as Share
from .world import ALONE as ALONE
from .world import World as World
from .world import open_world as open_world
