from .folder import RunFolder as RunFolder
from .folder import SAERun as SAERun
from .folder import State as State
from .folder import read_run as read_run
from .history import History as History
from .pictures import Pictures as Pictures
from .pictures import draw_pictures as draw_pictures
from .table import run_table as run_table
