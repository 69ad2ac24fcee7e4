from .guard import RunStopped
from .task import PenaltyTask, with_penalty
from .timm_script import find_train_script
from .train import read_summary, recipes, train

__all__ = ['PenaltyTask', 'RunStopped', 'find_train_script', 'read_summary', 'recipes', 'train', 'with_penalty']
