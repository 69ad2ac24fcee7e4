from .finetune import Finetuned, finetune
from .guard import RunStopped, newest_checkpoint
from .task import PenaltyTask, with_penalty
from .timm_script import find_train_script
from .train import read_summary, recipes, train
from .warm_start import warm_start

__all__ = [
    'Finetuned',
    'PenaltyTask',
    'RunStopped',
    'find_train_script',
    'finetune',
    'newest_checkpoint',
    'read_summary',
    'recipes',
    'train',
    'warm_start',
    'with_penalty',
]
