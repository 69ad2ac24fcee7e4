#!/usr/bin/env python3
"""`poolattn train` as a file, so that torchrun can start it: torchrun --nproc-per-node 8 train_scripts/train.py ..."""

import sys

from timm_poolattn.cli import main

if __name__ == '__main__':
    main(['train', *sys.argv[1:]], prog_name='train.py')
