"""`python -m timm_poolattn.hub`: write the cards of hub_configs again, from their results files."""

import json

from ..utils import released
from .releases import write_texts

for folder in released().values():
    write_texts(folder, json.loads((folder / 'results.json').read_text()))
