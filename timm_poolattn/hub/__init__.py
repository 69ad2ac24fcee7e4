from .release import model_card, paper_top1, release

__all__ = ['model_card', 'paper_top1', 'release']
