"""A folder and a tar of it have the same images, and what is passed over is said."""

import hashlib
import io
import os
import shutil
import tarfile

import pytest
from PIL import Image
from timm.data.readers import create_reader

from timm_poolattn.data import list_classes, load_images
from timm_poolattn.data.listing import list_split
from timm_poolattn.utils import MissingFileError, UserError


@pytest.fixture(params=['folder', 'tar'])
def read(request, image_folder, tmp_path):
    """Return a function that lists a split of `image_folder`, or of a tar of it."""

    def listing(split='train', root=image_folder, **options):
        if request.param == 'tar':
            with tarfile.open(tmp_path / 'pets.tar.gz', 'w:gz') as tar:
                tar.add(root, arcname='pets')
            root = tmp_path / 'pets.tar.gz'
        return list_split(root, split, **options)

    return listing


def names(listing, class_name='cat'):
    return [image.name for image in listing.images if image.class_name == class_name]


EIGHT = [f'cat/{i}.png' for i in range(8)]


def test_a_class_that_is_called_as_a_split(tmp_path):
    for name in ('train', 'plane'):
        (tmp_path / name).mkdir()
        Image.new('RGB', (8, 8)).save(tmp_path / name / 'a.png')
    with pytest.raises(UserError, match='if it is a class, rename it'):
        list_split(tmp_path, 'train')


def test_sub_folders_and_links(read, image_folder):
    cat = image_folder / 'train' / 'cat'
    (cat / 'a' / 'b').mkdir(parents=True)
    shutil.copy(cat / '0.png', cat / 'a' / 'b' / 'deep.png')
    os.link(cat / '1.png', cat / 'hard.png')
    (cat / 'soft.png').symlink_to('2.png')
    listing = read()
    assert names(listing) == [*EIGHT, 'cat/a/b/deep.png', 'cat/hard.png', 'cat/soft.png'] and not listing.notes


def test_pixels_of_links(image_folder, tmp_path):
    cat = image_folder / 'train' / 'cat'
    os.link(cat / '1.png', cat / 'hard.png')
    (cat / 'soft.png').symlink_to('2.png')
    with tarfile.open(tmp_path / 'pets.tar', 'w') as tar:
        tar.add(image_folder, arcname='.')
    folder, archive = load_images(image_folder, 'train'), load_images(tmp_path / 'pets.tar', 'train')
    assert archive.images.equal(folder.images) and archive.targets.equal(folder.targets)
    assert folder.images[8].equal(folder.images[1]) and folder.images[9].equal(folder.images[2])


def test_loops_are_passed_over(read, image_folder):
    (image_folder / 'train' / 'cat' / 'self').symlink_to('.')
    (image_folder / 'train' / 'cat' / 'up').symlink_to('..')
    (image_folder / 'train' / 'dog' / 'cats').symlink_to('../cat')
    (image_folder / 'train' / 'dog' / 'round').symlink_to('round')
    listing = read()
    assert names(listing) == EIGHT and len(listing.images) == 16
    (note,) = listing.notes
    assert 'passed over 4 ' in note and 'first cat/self (a link to what is read anyway)' in note


@pytest.mark.parametrize('target', ['../..', '../../test', '../../test/dog', '../../test/dog/0.png'])
def test_links_into_another_split_are_named(read, image_folder, target):
    (image_folder / 'train' / 'cat' / 'leak.png').symlink_to(target)
    (image_folder / 'train' / 'dog' / 'leak.png').symlink_to(target)
    listing = read()
    assert len(listing.images) == 16
    (note,) = listing.notes
    assert 'passed over 2 ' in note and 'cat/leak.png (a link out of the split' in note


def test_links_to_a_pool_are_followed(read, image_folder):
    (image_folder / 'train' / 'cat').rename(image_folder / 'pool')
    (image_folder / 'train' / 'cat').symlink_to('../pool')
    (image_folder / 'train' / 'dog' / 'more.png').symlink_to('../../pool/0.png')
    listing = read()
    assert names(listing) == EIGHT and names(listing, 'dog')[-1] == 'dog/more.png'
    (note,) = listing.notes
    assert 'followed 2 links out of the split, first cat -> ' in note


def test_what_is_no_image_is_counted(read, image_folder):
    cat = image_folder / 'train' / 'cat'
    for name in ('a.heic', 'b.gif', 'c.webp', 'd.avif', 'notes.txt'):
        shutil.copy(cat / '0.png', cat / name)
    (cat / 'gone.png').symlink_to('nowhere.png')
    os.mkfifo(cat / 'pipe.png')
    (image_folder / 'train' / 'stray.png').write_bytes(b'')
    for name in ('._0.png', '.DS_Store', '__MACOSX/x.png', '.hidden/x.png'):  # of macOS, and not worth a word
        (cat / name).parent.mkdir(exist_ok=True)
        shutil.copy(cat / '0.png', cat / name)
    shutil.copytree(
        cat, image_folder / '__MACOSX' / 'train' / 'cat', ignore=shutil.ignore_patterns('pipe.png', 'gone*')
    )
    listing = read()
    assert names(listing) == EIGHT
    images, others = listing.notes
    assert 'passed over 4 images in .avif, .gif, .heic, .webp, first cat/a.heic: make them PNG' in images
    assert 'passed over 4 that are no images' in others and 'first cat/gone.png' in others


def test_a_class_whose_name_is_no_text(read, image_folder):
    os.rename(image_folder / 'train' / 'cat', os.fsencode(image_folder / 'train') + b'/c\xff')
    with pytest.raises(UserError, match=r"train: the name of class 'c\\udcff' is no UTF-8; rename its folder"):
        read()


def test_classes_are_in_timms_order(read, image_folder):
    """So that timm's validate.py gives a class the number that it has here."""
    for split in ('train', 'test'):
        for name in ('10', '2', 'b', 'C', 'a10', 'a9', 'x²'):
            shutil.copytree(image_folder / split / 'cat', image_folder / split / name)
    classes = read(split='test').classes
    assert classes == ['2', '10', 'a9', 'a10', 'b', 'C', 'cat', 'dog', 'x²']
    shutil.rmtree(image_folder / 'test' / 'x²')  # at which timm's raises
    index = create_reader('', image_folder / 'test').class_to_idx
    assert sorted(index, key=index.get) == classes[:-1]


def test_the_note_is_one_line(image_folder, caplog):
    shutil.copy(image_folder / 'train' / 'cat' / '0.png', image_folder / 'train' / 'cat' / 'a.webp')
    load_images(image_folder, 'train')
    (record,) = caplog.records
    assert 'passed over 1 ' in record.message and '\n' not in record.message


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root reads all')
def test_an_unreadable_folder_is_named(image_folder):
    (image_folder / 'train' / 'cat' / 'locked').mkdir(mode=0)
    (note,) = list_split(image_folder, 'train').notes
    assert 'cat/locked (Permission denied)' in note


def test_a_held_out_image_whose_name_is_no_utf8(image_folder):
    folder = os.fsencode(image_folder / 'train' / 'cat')
    os.rename(folder + b'/0.png', folder + b'/caf\xe9.png')
    sides = [list_split(image_folder / 'train', split).images for split in ('train', 'test')]
    assert sum(map(len, sides)) == 16


def test_a_folder_of_classes(read, image_folder):
    """It is a split itself, or of it a part is held out."""
    train, root = read(root=image_folder / 'train', split='train'), image_folder / 'train'
    held_out = read('test', root)
    assert len(train.images) + len(held_out.images) == 16 and len(held_out.images) >= 2
    assert not set(train.images) & set(held_out.images)
    assert len(read('test', root, hold_out=False).images) == 16 == len(read('train', root, hold_out=False).images)


@pytest.mark.parametrize('n', [2, 3, 40, 400])
def test_who_is_held_out_stays_so(tmp_path, n):
    """When others come. It is about a fifth, and never all or none."""

    def names(split):
        return {image.name for image in list_split(tmp_path, split).images}

    for name in ('cat', 'dog'):
        (tmp_path / name).mkdir()
        for i in range(n):
            (tmp_path / name / f'{i}.png').write_bytes(b'')
    train, held = names('train'), names('test')
    assert not train & held and len(train | held) == 2 * n
    assert 2 <= len(held) <= 2 * (n - 1) and (n < 400 or 0.15 < len(held) / 2 / n < 0.25)
    for name in ('cat', 'dog'):
        for i in range(n, 2 * n):
            (tmp_path / name / f'{i}.png').write_bytes(b'')
    assert not train & names('test') and (n < 40 or not held & names('train'))


def test_one_of_a_class_is_trained_on(tmp_path):
    """Though the names of both are of those that are held out."""
    names = [f'cat/{i}.png' for i in range(100)]
    held = [name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256 < 0.2][:2]
    (tmp_path / 'cat').mkdir()
    for name in held:
        (tmp_path / name).write_bytes(b'')
    assert [len(list_split(tmp_path, split).images) for split in ('train', 'test')] == [1, 1]


def test_images_of_other_formats_are_named_as_such(image_folder):
    for name in ('a.webp', 'b.GIF', 'Thumbs.db'):
        (image_folder / 'train' / 'cat' / name).write_bytes(b'')
    notes = list_split(image_folder, 'train').notes
    assert notes[0].endswith('passed over 2 images in .gif, .webp, first cat/a.webp: make them PNG or JPEG')
    assert notes[1].endswith('passed over 1 that are no images or not of this split, first cat/Thumbs.db')


def add(tar, name, blob=b'', **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(blob)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(blob))


def test_tar_members_do_no_harm(image_folder, tmp_path):
    blob = (image_folder / 'train' / 'cat' / '0.png').read_bytes()
    with tarfile.open(tmp_path / 'pets.tar', 'w') as tar:
        add(tar, 'train/cat/a.png', blob)
        add(tar, './train//cat/../dog/b.png', blob)
        add(tar, '/train/dog/c.png', blob)
        add(tar, '../train/cat/evil.png', blob)
        for i, target in enumerate(('/etc/passwd', '../../../etc/passwd', 'link4.png', 'nowhere.png')):
            add(tar, f'train/cat/link{i}.png', type=tarfile.SYMTYPE, linkname=target)
        add(tar, 'train/cat/link4.png', type=tarfile.SYMTYPE, linkname='link2.png')
        add(tar, 'train/cat/hard.png', type=tarfile.LNKTYPE, linkname='nowhere.png')
        add(tar, 'train/cat/device.png', type=tarfile.CHRTYPE)
        add(tar, 'train/cat/a.png', blob)  # the last of one name counts, once
    listing = list_split(tmp_path / 'pets.tar', 'train')
    assert [image.name for image in listing.images] == ['cat/a.png', 'dog/b.png', 'dog/c.png']
    assert 'passed over 8 ' in listing.notes[0] and not (tmp_path / 'train').exists()
    assert len(load_images(tmp_path / 'pets.tar', 'train')) == 3


def test_a_sparse_member_that_claims_gigabytes(tmp_path):
    with open(tmp_path / 'huge.png', 'wb') as f:
        f.truncate(20 * 2**30)
    info = tarfile.TarInfo('train/cat/huge.png')
    info.size = 0
    info.pax_headers = {'GNU.sparse.major': '0', 'GNU.sparse.minor': '1', 'GNU.sparse.map': '0,0'}
    info.pax_headers['GNU.sparse.size'] = str(20 * 2**30)
    with tarfile.open(tmp_path / 'pets.tar', 'w', format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(UserError, match=r'huge.png has 21,474,836,480 bytes'):
        list_split(tmp_path / 'pets.tar', 'train')


def test_too_many_members(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_poolattn.data.listing.MAX_MEMBERS', 20)
    with tarfile.open(tmp_path / 'pets.tar', 'w') as tar:
        tar.add(image_folder)
    with pytest.raises(UserError, match='more than 20 members; unpack it'):
        list_split(tmp_path / 'pets.tar', 'train')


@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:bz2', 'w:xz'])
@pytest.mark.parametrize('share', [0.3, 0.5, 0.77, 0.9])
def test_a_tar_that_is_cut_short(image_folder, tmp_path, mode, share):
    path = tmp_path / 'pets.tar'
    with tarfile.open(path, mode) as tar:
        tar.add(image_folder, arcname='.')
    blob = path.read_bytes()
    path.write_bytes(blob[: int(len(blob) * share)])
    with pytest.raises(UserError, match=r'pets.tar: (cannot be read as a tar|neither a folder nor a tar)'):
        load_images(path, 'train')


def test_a_damaged_header_is_not_the_end(image_folder, tmp_path):
    path = tmp_path / 'pets.tar'
    with tarfile.open(path, 'w') as tar:
        tar.add(image_folder, arcname='.')
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[10].offset
    blob = bytearray(path.read_bytes())
    blob[offset] ^= 0xFF
    path.write_bytes(blob)
    with pytest.raises(UserError, match='damaged after 10 members'):
        list_split(path, 'train')


def test_errors(image_folder, tmp_path):
    with pytest.raises(MissingFileError, match='nowhere: no such folder or tar file'):
        list_classes(tmp_path / 'nowhere')
    with pytest.raises(MissingFileError, match="no split 'holdout'; it holds test, train"):
        list_split(image_folder, 'holdout')
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    with pytest.raises(UserError, match='neither a folder nor a tar file'):
        list_classes(tmp_path / 'a.png')
    (image_folder / 'train' / 'bird').mkdir()
    (image_folder / 'train' / 'bird' / 'a.heic').touch()
    with pytest.raises(UserError, match=r'no images \(.jpeg, .jpg, .png\) in bird; passed over 1 .* first bird/a.heic'):
        list_classes(image_folder)
