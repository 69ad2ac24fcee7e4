from .card import model_card
from .publication import publish
from .releases import release, write_texts
from .verification import verify

__all__ = ['model_card', 'publish', 'release', 'verify', 'write_texts']
