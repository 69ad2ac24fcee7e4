"""python -m timm_poolattn SCRIPT.py ARGS...: run a script of timm's, unchanged, with our models registered.

timm's validate.py, inference.py, benchmark.py, onnx_export.py and others have no option to import a package first.
"""

import runpy
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """Run the script argv[0] as `python` would, with the arguments argv[1:].

    Raises:
        SystemExit: no such script (code 2, in one line), or whatever the script exits with.
    """
    if not argv or not Path(argv[0]).is_file():
        missing = f'no file {argv[0]}' if argv else 'no script given'
        print(f'Error: {missing}; usage: python -m timm_poolattn SCRIPT.py ARGS...', file=sys.stderr)
        raise SystemExit(2)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))  # where python looks first for what a script imports
    runpy.run_path(argv[0], run_name='__main__')


if __name__ == '__main__':
    main(sys.argv[1:])
