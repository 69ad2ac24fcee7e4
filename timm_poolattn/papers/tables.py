"""The papers' result tables as data: every row as printed, and the model that it describes."""

from importlib.resources import files
from typing import Any

import yaml

#: Rows of Table 4 of the SPEM paper by `SPEM(reweight=...)`.
_REWEIGHT_ROWS = dict(
    a='unshared',
    b='no_sigmoid',
    c='product',
    d='sigmoid_sum',
    e='sigmoid_product',
    f='max',
    g='min',
    none='none',
    ours='sum',
)


def table_rows() -> list[dict[str, Any]]:
    """Return every row of the result tables. `tables.yaml` explains its fields."""
    return yaml.safe_load((files(__package__) / 'tables.yaml').read_text())['rows']


def model_args(row: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `timm.create_model` for a row of `table_rows()`."""
    arch = row['model']
    if arch in ('vgg19', 'inception_v4'):
        arch = f'cifar_{arch}'  # timm owns the plain names
    args: dict[str, Any] = dict(model_name=f'{arch}.{row["dataset"]}')
    if row['dataset'] == 'imagenet5':
        # FA paper, Sec. IV-D: the Tiny ImageNet network with five classes
        args.update(model_name=f'{arch}.tiny_imagenet', num_classes=5, stem_stride=2)
        args.update(pretrained_cfg_overlay=dict(input_size=(3, 224, 224)))
    if row['paper'] == 'fa' and arch.startswith('resnet'):
        args['flavour'] = 'fa'
    if 'se_ratio' in row:
        args['gate_kwargs'] = dict(rd_ratio=1 / row['se_ratio'])
    kind, _, rest = row.get('variant', '').partition(' ')
    if kind == 'fixed':  # "fixed lambda 0.1: u = ..."
        args['gate_kwargs'] = dict(fixed_lambda=float(rest.split()[1].rstrip(':')))
    elif kind == 'reweight':  # "reweight a: ..."
        args['gate_kwargs'] = dict(reweight=_REWEIGHT_ROWS[rest.split(':')[0]])
    return args


def row_top1(row: dict[str, Any]) -> float | None:
    """Return the top-1 accuracy in % that a row of `table_rows()` prints, as such or as an error, or None."""
    return row['top1'] if 'top1' in row else round(100 - row['top1_err'], 4) if 'top1_err' in row else None
