from .arguments import recipes
from .finetuning import Finetuned, finetune
from .penalty import PenaltyTask, with_penalty
from .recovery import RunStopped, newest_checkpoint
from .runner import train
from .runs import Run, read_curve, read_run, teachers_of
from .teachers import soft_targets
from .timm_script import find_train_script
from .warm_starts import warm_start

__all__ = [
    'Finetuned',
    'PenaltyTask',
    'Run',
    'RunStopped',
    'find_train_script',
    'finetune',
    'newest_checkpoint',
    'read_curve',
    'read_run',
    'recipes',
    'soft_targets',
    'teachers_of',
    'train',
    'warm_start',
    'with_penalty',
]
