from .datasets import DATASETS
from .tables import model_args, row_top1, table_rows

__all__ = ['DATASETS', 'model_args', 'row_top1', 'table_rows']
