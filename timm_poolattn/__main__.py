"""`python -m timm_poolattn` is the command line `poolattn`."""

from .cli import main

if __name__ == '__main__':
    main(prog_name='poolattn')
