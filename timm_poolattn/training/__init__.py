from .task import PenaltyTask
from .timm_script import find_train_script
from .train import read_summary, train
from .warm_start import warm_start

__all__ = ['PenaltyTask', 'find_train_script', 'read_summary', 'train', 'warm_start']
