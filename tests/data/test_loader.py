import pytest
import torch
from timm.data import FastCollateMixup, Mixup

from timm_poolattn.data import BatchErasing, ImageData, ResidentDataset, ResidentLoader
from timm_poolattn.utils import UserError

STATS = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def dataset(n=50, size=8, seed=42):
    """Image i has the value i everywhere but in its top row, where it is its column, so that shifts and flips show."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, size, size, 3).contiguous()
    images[:, 0] = torch.arange(100, 100 + size, dtype=torch.uint8).view(1, size, 1)
    return ResidentDataset(ImageData(images, torch.arange(n), [str(i) for i in range(n)]), seed)


def loader(data=None, batch_size=10, is_training=True, **kwargs):
    return ResidentLoader(data or dataset(), (3, 8, 8), batch_size, is_training=is_training, **STATS, **kwargs)


def pixels(input):
    """Undo the normalisation."""
    return (input * torch.tensor(STATS['std']).view(3, 1, 1) + torch.tensor(STATS['mean']).view(3, 1, 1)) * 255


def test_evaluation_batches():
    batches = list(loader(batch_size=20, is_training=False))
    assert [len(t) for _, t in batches] == [20, 20, 10] and len(loader(batch_size=20, is_training=False)) == 3
    input, target = torch.cat([x for x, _ in batches]), torch.cat([t for _, t in batches])
    assert target.tolist() == list(range(50))
    expected = dataset().data.images.permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(STATS[k], dtype=torch.double).view(3, 1, 1) for k in ('mean', 'std'))
    torch.testing.assert_close(input.double(), (expected - mean) / std, rtol=1e-5, atol=1e-5)
    assert input.is_contiguous(memory_format=torch.channels_last) and input.dtype == torch.float32


def test_training_augmentation_is_crop_and_flip():
    """Every training image is one of the 25 crops, flipped or not, of its zero-padded original; all of them occur."""
    data = dataset()
    originals = torch.nn.functional.pad(data.data.images.permute(0, 3, 1, 2), (2, 2, 2, 2))
    seen = set()
    for epoch in range(20):
        data.set_epoch(epoch)
        for input, target in loader(data, crop_padding=2):
            for image, i in zip(pixels(input).round().to(torch.uint8), target.tolist(), strict=True):
                found = [
                    (y, x, flip)
                    for y in range(5)
                    for x in range(5)
                    for flip in (False, True)
                    if image.equal(
                        originals[i, :, y : y + 8, x : x + 8].flip(2) if flip else originals[i, :, y : y + 8, x : x + 8]
                    )
                ]
                assert found
                seen.update(found)
    assert len(seen) == 50


def test_crop_padding_is_an_eighth_by_default():
    assert loader().crop_padding == 1
    assert loader(is_training=False).crop_padding == 0
    big = ResidentLoader(dataset(size=32), (3, 32, 32), 10, is_training=True, **STATS)
    assert big.crop_padding == 4
    bigger = ResidentLoader(dataset(size=64), (3, 64, 64), 10, is_training=True, **STATS)
    assert bigger.crop_padding == 8


def test_no_augmentation():
    for input, target in loader(crop_padding=0, hflip=0.0):
        expected = dataset().data.images[target].permute(0, 3, 1, 2).float()
        torch.testing.assert_close(pixels(input), expected, atol=1e-3, rtol=0)


def test_an_epoch_is_every_image_once_in_a_new_order():
    data = dataset()
    orders = []
    for epoch in range(3):
        data.set_epoch(epoch)
        orders.append(torch.cat([t for _, t in loader(data)]).tolist())
        assert sorted(orders[-1]) == list(range(50))
    assert orders[0] != orders[1] != orders[2]


def test_same_seed_and_epoch_same_batches():
    def epoch(seed, epoch):
        data = dataset(seed=seed)
        data.set_epoch(epoch)
        torch.rand(7)  # the global generator plays no part
        return torch.cat([x for x, _ in loader(data)])

    assert epoch(1, 3).equal(epoch(1, 3))
    assert not epoch(1, 3).equal(epoch(2, 3)) and not epoch(1, 3).equal(epoch(1, 4))


def test_incomplete_batches():
    assert [len(t) for _, t in loader(batch_size=20)] == [20, 20]  # as timm's training loader
    assert [len(t) for _, t in loader(batch_size=64)] == [50]  # a data set smaller than a batch still trains
    assert len(loader(batch_size=20)) == 2 and len(loader(batch_size=64)) == 1


@pytest.mark.parametrize('batch_size', [5, 16])
@pytest.mark.parametrize('is_training', [True, False])
def test_ranks_share_an_epoch(is_training, batch_size):
    ranks = [loader(batch_size=batch_size, is_training=is_training, rank=r, world_size=4) for r in range(4)]
    shares = [torch.cat([t for _, t in rank]) for rank in ranks]
    assert len({len(s) for s in shares}) == 1
    every = torch.cat(shares).tolist()
    if is_training:  # 12 each: batches of 5 leave the incomplete one out, a single batch is what there is
        assert len(set(every)) == len(every) == (40 if batch_size == 5 else 48)
    else:
        assert set(every) == set(range(50)) and len(every) == 52


def test_dtype():
    input, _ = next(iter(loader(img_dtype=torch.bfloat16)))
    assert input.dtype == torch.bfloat16


def test_random_erasing_and_mixup():
    (input, _), (whole, _) = (next(iter(loader(erasing=erasing))) for erasing in (BatchErasing(1.0), None))
    erased = (input != whole).any(1)
    assert erased.any((1, 2)).all() and not erased.all() and (input == 0).all(1)[erased].all()
    for mode in ('const', 'rand', 'pixel'):
        input, _ = next(iter(loader(erasing=BatchErasing(1.0, mode))))
        assert input.is_contiguous(memory_format=torch.channels_last)
    for mixup in (Mixup, FastCollateMixup):
        fn = mixup(mixup_alpha=1.0, num_classes=50, label_smoothing=0.0)
        batches = loader(mixup=fn, hflip=0.0, crop_padding=0)
        input, target = next(iter(batches))
        assert target.shape == (10, 50)
        torch.testing.assert_close(target.sum(1), torch.ones(10))
        assert ((target > 0) & (target < 1)).any() and input.shape == (10, 3, 8, 8)
        batches.mixup_enabled = False  # what train.py's --mixup-off-epoch does
        input, target = next(iter(batches))
        assert target.shape == (10, 50) and target.eq(1).sum() == 10


def test_mixup_of_an_odd_batch():
    """timm's mixup pairs images: of a data set smaller than a batch, the odd one is left out."""
    fn = Mixup(mixup_alpha=1.0, num_classes=5)
    ((input, target),) = loader(dataset(n=5), mixup=fn)
    assert input.shape == (4, 3, 8, 8) and target.shape == (4, 5)
    with pytest.raises(UserError, match='mixup and cutmix pair images, and there is one'):
        next(iter(loader(dataset(n=1), mixup=fn)))


def test_without_a_compiler_batches_are_the_same(caplog):
    def no_compiler(graph, inputs):
        raise RuntimeError('Failed to find C compiler')

    batches = loader()
    batches._compiled = torch.compile(batches._gather, backend=no_compiler)  # as on CUDA
    for (input, target), (plain, same) in zip(batches, loader(), strict=True):
        assert input.equal(plain) and target.equal(same)
    (said,) = [record.getMessage() for record in caplog.records if record.name == 'timm_poolattn.data.loader']
    assert said.startswith('the loader runs without torch.compile, slower: ') and 'Failed to find C compiler' in said


def test_larger_images():
    """Random crops of the images as they are in training, the centre in evaluation."""
    images = torch.arange(12).view(1, 1, 12, 1).expand(30, 12, 12, 3) + 20 * torch.arange(12).view(1, 12, 1, 1)
    data = ResidentDataset(ImageData(images.to(torch.uint8), torch.arange(30), [str(i) for i in range(30)]))
    ((input, _),) = loader(data, batch_size=30, is_training=False)
    assert pixels(input).round().int()[:, :, 0, 0].eq(20 * 2 + 2).all()
    seen = set()
    for epoch in range(20):
        data.set_epoch(epoch)
        for input, _ in loader(data, hflip=0.0):
            corner = pixels(input).round().int()[:, 0, 0, 0]
            assert pixels(input).round().int()[:, 0, 7, 7].equal(corner + 20 * 7 + 7)
            seen.update(corner.tolist())
    assert seen == {20 * y + x for y in range(5) for x in range(5)}


class TestBatchErasing:
    def draw(self, n=20000, **kwargs):
        boxes = BatchErasing(**{'probability': 1.0, **kwargs}).draw(n, 32, 32, torch.Generator().manual_seed(0))
        return boxes, (boxes[..., 2:] - boxes[..., :2]).prod(-1) / 32**2

    @pytest.mark.parametrize('max_count', [1, 3])
    def test_boxes_are_distributed_as_timms(self, max_count):
        """Area, height and position of the erased pixels, against timm's own erasing of as many images."""
        import random

        from timm.data.random_erasing import RandomErasing

        random.seed(0)
        n = 20000
        boxes, _ = self.draw(n, max_count=max_count)
        ours = BatchErasing(1.0, max_count=max_count)(torch.ones(n, 1, 32, 32), boxes)
        timms = RandomErasing(1.0, max_count=max_count, device='cpu')(torch.ones(n, 1, 32, 32))
        for erased in (lambda x: (x == 0).float().mean(0).mean(), lambda x: (x == 0).any(3).float().mean()):
            assert erased(ours).item() == pytest.approx(erased(timms).item(), abs=0.01)
        where = [(x == 0).float().mean((0, 1)) for x in (ours, timms)]
        torch.testing.assert_close(*where, atol=0.02, rtol=0)

    def test_boxes_lie_within(self):
        boxes, area = self.draw()
        assert (boxes[..., :2] >= 0).all() and (boxes[..., 2:] <= 32).all()
        assert 0.01 < area.min() < 0.03 and 0.3 < area.max() < 0.36

    def test_probability(self):
        _, area = self.draw(probability=0.25)
        assert (area > 0).float().mean().item() == pytest.approx(0.25, abs=0.01)

    def test_fills(self):
        boxes = torch.tensor([[[1, 2, 4, 7]], [[0, 0, 0, 0]]])
        ones = torch.ones(2, 3, 8, 8)
        for mode in ('const', 'rand', 'pixel'):
            out = BatchErasing(1.0, mode)(ones.clone(), boxes)
            box = out[0, :, 1:4, 2:7]
            assert (out != 1).sum() == (box != 1).sum() == 3 * 3 * 5
            assert len(box.unique()) == {'const': 1, 'rand': 3, 'pixel': 45}[mode]
        with pytest.raises(ValueError, match='--remode x: choose from const, rand, pixel'):
            BatchErasing(1.0, 'x')

    def test_is_a_function_of_seed_and_epoch(self):
        epochs = []
        for _ in range(2):
            torch.rand(3)
            epochs.append(torch.cat([x for x, _ in loader(erasing=BatchErasing(0.5))]))
        assert epochs[0].equal(epochs[1])


def test_fewer_images_than_processes():
    with pytest.raises(ValueError, match='3 images are too few for 4 processes'):
        loader(dataset(n=3), world_size=4)


def test_wrong_size_is_named():
    with pytest.raises(ValueError, match=r'images are 3x8x8 and the model wants 3x32x32; give --input-size 3 8 8'):
        ResidentLoader(dataset(), (3, 32, 32), 10, is_training=True, **STATS)
