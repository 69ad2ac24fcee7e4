from .datasets import DATASETS
from .tables import model_args, paper_top1, row_top1, table_rows

__all__ = ['DATASETS', 'model_args', 'paper_top1', 'row_top1', 'table_rows']
