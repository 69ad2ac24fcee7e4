from .card import model_card
from .release import release

__all__ = ['model_card', 'release']
