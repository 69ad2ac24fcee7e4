from .datasets import DATASETS
from .tables import architecture, model_args, paper_top1, row_top1, table_rows

__all__ = ['DATASETS', 'architecture', 'model_args', 'paper_top1', 'row_top1', 'table_rows']
