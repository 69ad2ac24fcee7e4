"""The one progress bar."""

from functools import partial

from tqdm import tqdm

#: tqdm, silent for what takes under a second and where the output is no terminal, and gone when it is done.
progress = partial(tqdm, delay=1, leave=False, disable=None)
