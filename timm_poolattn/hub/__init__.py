from .card import model_card
from .publish import publish
from .release import release
from .verify import verify

__all__ = ['model_card', 'publish', 'release', 'verify']
