from .firing import FiringStatistics as FiringStatistics
from .loop import Lane as Lane
from .loop import fit as fit
from .optimizer import ScheduledOptimizer as ScheduledOptimizer
from .schedule import ComposedSchedule as ComposedSchedule
from .trainer import SAETrainer as SAETrainer
