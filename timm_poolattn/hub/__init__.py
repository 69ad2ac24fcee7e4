from .card import model_card
from .publish import publish
from .release import release, write_texts
from .verify import verify

__all__ = ['model_card', 'publish', 'release', 'verify', 'write_texts']
