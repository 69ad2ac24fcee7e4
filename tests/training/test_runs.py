"""Reading a run's folder: its curve, its model, its classes."""

import json

import pytest
import timm
from timm.data import ImageDataset

from timm_poolattn.data import View
from timm_poolattn.training import read_curve, read_run
from timm_poolattn.utils import MissingFileError, UserError

HEADER, ROWS = 'epoch,train_loss,eval_top1,lr\n', ['0,1.5,50.25,0.1\n', '1,1.25,60.5,0.1\n', '2,1.0,70.75,0.05\n']
CURVE = [
    dict(epoch=0, train_loss=1.5, eval_top1=50.25, lr=0.1),
    dict(epoch=1, train_loss=1.25, eval_top1=60.5, lr=0.1),
    dict(epoch=2, train_loss=1.0, eval_top1=70.75, lr=0.05),
]


@pytest.mark.parametrize(
    'text, curve',
    [
        ('', []),
        (HEADER, []),
        (HEADER + ''.join(ROWS), CURVE),
        (HEADER + ROWS[0] + '\n' + ROWS[1] + '\n\n' + ROWS[2], CURVE),
        (HEADER + ROWS[0] + ROWS[1] + '2,1.0,70', CURVE[:2]),
        (HEADER + ROWS[0] + ROWS[1] + '2,1.0,70.75,0.0', CURVE[:2]),  # as many columns, and yet cut
        (HEADER + ROWS[0] + '1,1.2' + HEADER + ROWS[1] + ROWS[2], CURVE),  # cut, and resumed
        (HEADER + ROWS[0] + '1,\0\0\0\0\0,\0,\0\n', CURVE[:1]),
        (HEADER + ''.join(ROWS) + HEADER + ROWS[1], CURVE[:2]),  # resumed from an earlier checkpoint
    ],
    ids=['empty', 'header', 'whole', 'blank', 'cut', 'cut-number', 'cut-resumed', 'zeros', 'earlier'],
)
def test_the_whole_rows_are_the_curve(tmp_path, text, curve):
    for end in ('\n', '\r\n'):  # timm's writer has the latter
        (tmp_path / 'summary.csv').write_text(text, newline=end)
        assert read_curve(tmp_path) == curve


def test_a_run_of_train_py_alone(image_folder, tmp_path):
    """Its classes are in timm's natural order, and its images were cropped at the centre."""
    for split in ('train', 'test'):
        (image_folder / split / 'dog').rename(image_folder / split / 'Dog')
    (tmp_path / 'args.yaml').write_text(
        f'model: resnet20\nnum_classes: 2\ndata_dir: {image_folder}\nval_split: test\ninput_size: [3, 8, 8]\n'
    )
    run, model = read_run(tmp_path), timm.create_model('resnet20', num_classes=2)
    model.pretrained_cfg = {**model.pretrained_cfg, 'crop_mode': 'squash'}
    assert ImageDataset(str(image_folder / 'train')).reader.class_to_idx == {'cat': 0, 'Dog': 1}
    assert run.classes == run.load_data(model).classes == ['cat', 'Dog']
    assert run.data_config(model)['crop_mode'] == 'center'


def test_no_summary_is_no_curve(tmp_path):
    assert read_curve(tmp_path) == []


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r'no args\.yaml; is it the output folder of'):
        read_run(tmp_path)
    (tmp_path / 'args.yaml').write_text('lr: 1')
    with pytest.raises(UserError, match=r'args\.yaml: says no model'):
        read_run(tmp_path)
    (tmp_path / 'args.yaml').write_text('model: resnet20')
    (tmp_path / 'run.json').write_text('{"recipe": "x", ')
    with pytest.raises(UserError, match=r'run\.json: cannot be read .* cut short'):
        read_run(tmp_path)
    for record, said in (
        (dict(classes='cat'), 'classes is cat'),
        (dict(classes=[1]), r'classes is \[1\]'),
        (dict(options=[]), r'options is \[\]'),
        (dict(versions=None), 'versions is None'),
        (dict(resumed=[3]), r'resumed is \[3\]'),
        (dict(wall_time_s='x'), 'wall_time_s is x'),
    ):
        (tmp_path / 'run.json').write_text(json.dumps(record))
        with pytest.raises(UserError, match=rf'run\.json: {said}, which no run writes'):
            read_run(tmp_path)
    (tmp_path / 'run.json').unlink()
    with pytest.raises(UserError, match=r'args\.yaml: says no data_dir; give --data-dir'):
        read_run(tmp_path).data_dir()
    (tmp_path / 'args.yaml').write_text('model: resnet20\ndata_dir: nowhere')
    with pytest.raises(MissingFileError, match=r'nowhere: the data of .* are not there; --data-dir names another'):
        read_run(tmp_path).data_dir()
    (tmp_path / 'args.yaml').write_text('model: resnet20\nmean: [0.5, 0.5]')
    with pytest.raises(UserError, match=r'args\.yaml: cannot be of the images'):
        read_run(tmp_path).data_config(timm.create_model('resnet20'))
    (tmp_path / 'args.yaml').write_text('model: resnet20\ncrop_pct: -1')
    with pytest.raises(UserError, match=r'crop_pct is -1, and must be over 0'):
        View.of(read_run(tmp_path).data_config(timm.create_model('resnet20')))
    with pytest.raises(MissingFileError, match=r'last\.pth\.tar: no such checkpoint'):
        read_run(tmp_path).build_model()
    (tmp_path / 'last.pth.tar').write_bytes(b'PK')
    with pytest.raises(UserError, match=r'last\.pth\.tar: no checkpoint of `poolattn train`'):
        read_run(tmp_path).build_model()
    with pytest.raises(UserError, match="unknown checkpoint 'first'; choose from last, best"):
        read_run(tmp_path).build_model('first')


def test_a_run_of_train_py_alone_sees_images_as_it_did(tmp_path):
    (tmp_path / 'args.yaml').write_text('model: resnet18\nnum_classes: 10\n')
    run = read_run(tmp_path)
    config = run.data_config(run.untrained_model())
    assert (config['crop_pct'], config['input_size']) == (0.95, (3, 224, 224))
