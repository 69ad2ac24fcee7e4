"""`python -m timm_poolattn.hub`: write the cards of hub_configs again, from their results files."""

import json

from ..utils import released
from .releases import write_texts

if __name__ == '__main__':
    for folder in released().values():
        write_texts(folder, json.loads((folder / 'results.json').read_text()))
        print(f'wrote {folder / "README.md"}')
