"""A loader for data that fits on the training device: whole batches are sampled and augmented there."""

import logging
import math
import random
from collections.abc import Iterator, Sequence

import torch
from timm.data import Mixup
from torch.nn import functional as F

from ..utils import UserError
from .images import ImageData

_logger = logging.getLogger(__name__)


class ResidentDataset:
    """What timm's train.py holds as a data set: the images, and the epoch that the loader draws its order from.

    Args:
        data: the images and their classes.
        seed: of order and augmentation, as train.py's.
    """

    def __init__(self, data: ImageData, seed: int = 42) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class BatchErasing:
    """Random erasing (arXiv:1708.04896) as timm.data.RandomErasing does it, for whole batches.

    Args:
        probability: of erasing in an image.
        mode: 'const' (0, the mean), 'rand' (a normal colour for each box) or 'pixel' (normal noise).
        max_count: boxes in an image, 1 to this many, which share the area.
        area: least and largest share of the image, as timm's.
        aspect: least aspect ratio; the largest is its inverse, as timm's.
    """

    def __init__(
        self,
        probability: float,
        mode: str = 'const',
        max_count: int = 1,
        *,
        area: tuple[float, float] = (0.02, 1 / 3),
        aspect: float = 0.3,
    ) -> None:
        if mode not in ('const', 'rand', 'pixel'):
            raise UserError(f'--remode {mode}: choose from const, rand, pixel')
        self.probability = probability
        self.mode = mode
        self.max_count = max_count
        self.area = area
        self.aspect = aspect

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
        """Draw boxes for n images: (n, max_count, 4), top, left, bottom and right; empty where nothing is erased."""
        shape = (n, self.max_count, 10)  # as timm does, up to ten attempts at a box that fits
        count = torch.randint(1, self.max_count + 1, (n, 1, 1), generator=generator)
        low, high = self.area
        area = (low + (high - low) * torch.rand(shape, generator=generator)) * height * width / count
        ratio = torch.exp(-math.log(self.aspect) * (2 * torch.rand(shape, generator=generator) - 1))
        h, w = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (h < height) & (w < width)
        attempt = fits.int().argmax(2, keepdim=True)  # the first that fits
        h, w = h.gather(2, attempt)[..., 0], w.gather(2, attempt)[..., 0]
        top, left = (
            (torch.rand(n, self.max_count, generator=generator) * (free + 1)).long() for free in (height - h, width - w)
        )
        erase = (torch.rand(n, 1, generator=generator) <= self.probability) & fits.any(2)
        erase &= torch.arange(self.max_count) < count[..., 0]
        return torch.stack([top, left, top + h, left + w], 2) * erase[..., None]

    def __call__(self, input: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Erase `boxes` (B, max_count, 4) in `input` (B, C, H, W), in place; returns it."""
        rows, cols = (torch.arange(size, device=input.device) for size in input.shape[2:])
        for top, left, bottom, right in boxes[..., None].permute(1, 2, 0, 3):  # each (B, 1)
            in_rows, in_cols = (rows >= top) & (rows < bottom), (cols >= left) & (cols < right)
            mask = in_rows[:, None, :, None] & in_cols[:, None, None, :]
            if self.mode == 'const':
                input.masked_fill_(mask, 0)
            else:
                fill = torch.randn_like(input if self.mode == 'pixel' else input[:, :, :1, :1])
                input.copy_(torch.where(mask, fill, input))
        return input


class ResidentLoader:
    """Batches of a `ResidentDataset` by timm's loader protocol: (input, target), normalised, on the device.

    Training batches are a fresh order each epoch, cropped at random and flipped. Images of the model's size are
    zero-padded by `crop_padding` first; larger ones are cropped as they are. Evaluation batches are the images in
    order, cropped at the centre where they are larger. Order, crops, flips and erased boxes are a function of the data
    set's seed and epoch alone: the same on any device, and each of `world_size` ranks sees its share of the same epoch.

    A crop is one window of an image, and a flip a window of its mirrored copy, which is held too: so a batch is one
    gather of windows of uint8 and one pass that normalises it. On CUDA torch.compile makes them one kernel, where it
    finds what it needs: a C compiler, and Triton, which torch has on Linux.

    input: (B, C, H, W) of `img_dtype`, channels_last in memory; target: (B,) int64, or (B, classes)
    of soft targets or after `mixup`.

    Args:
        dataset: what to load.
        input_size: (C, H, W) of the model; the images may be larger, not smaller.
        batch_size: B. In training the last, incomplete batch is left out as timm's loader does, unless it is the only.
        is_training: shuffle.
        mean: per channel, of images in [0, 1].
        std: per channel, of images in [0, 1].
        augment: crop at random, flip and erase, in training.
        img_dtype: dtype of the input.
        device: where the images are held.
        crop_padding: pixels on each side. Default: H // 8 (4 for 32x32, 8 for 64x64, as in the papers), or 0 where
            the images are larger than `input_size`.
        hflip: probability of a horizontal flip.
        erasing: applied after normalisation.
        mixup: timm's, applied last.
        rank: of this process.
        world_size: processes that share the data.

    Raises:
        UserError: the images are smaller than `input_size`, have other channels, or are fewer than processes; or, once
            a batch is made, one image is all there is for mixup.
    """

    sampler = batch_sampler = None  # train.py looks for their set_epoch; the data set has it

    def __init__(
        self,
        dataset: ResidentDataset,
        input_size: Sequence[int],
        batch_size: int,
        *,
        is_training: bool,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = True,
        img_dtype: torch.dtype = torch.float32,
        device: torch.device | str = 'cpu',
        crop_padding: int | None = None,
        hflip: float = 0.5,
        erasing: BatchErasing | None = None,
        mixup: Mixup | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        images = dataset.data.images
        h, w, c = images.shape[1:]
        channels, *size = input_size
        if c != channels or h < size[0] or w < size[1]:
            raise UserError(
                f'the images are {c}x{h}x{w} and the model wants {"x".join(map(str, input_size))};'
                f' give --input-size {c} {h} {w}, or use --no-resident to resize them'
            )
        if len(dataset) < world_size:
            raise UserError(f'{len(dataset)} images are too few for {world_size} processes; start fewer')
        self.dataset = dataset
        self.batch_size = batch_size
        self.is_training = is_training
        self.augment = is_training and augment
        self.img_dtype = img_dtype
        self.device = torch.device(device)
        p = (0 if [h, w] != size else h // 8) if crop_padding is None else crop_padding
        self.crop_padding = p if self.augment else 0
        self.hflip = hflip if self.augment else 0.0
        self.erasing = erasing if self.augment else None
        self.mixup = mixup
        self.rank = rank
        self.world_size = world_size
        p = self.crop_padding
        images = F.pad(images, (0, 0, p, p, p, p)).to(self.device)  # zeros are black, unnormalised
        if self.hflip:
            images = torch.cat([images, images.flip(2)])
        self.margin = (h + 2 * p - size[0], w + 2 * p - size[1])
        # every crop of every image as a view: (N or 2N, top, left, H, W, C)
        self.windows = images.unfold(1, size[0], 1).unfold(2, size[1], 1).permute(0, 1, 2, 4, 5, 3)
        self.targets = dataset.data.targets.to(self.device)
        # uint8 in, so the statistics are scaled rather than the images; whole rows of them, for one long inner loop
        self.mean, self.std = (
            255 * torch.tensor(s, dtype=torch.float32, device=self.device).repeat(size[0] * size[1])
            for s in (mean, std)
        )
        self._compiled = torch.compile(self._gather) if self.device.type == 'cuda' and is_training else None

    @property
    def mixup_enabled(self) -> bool:
        return self.mixup is not None and self.mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enable: bool) -> None:
        self.mixup.mixup_enabled = enable

    def _share(self) -> int:
        """Return the images of this rank in an epoch: all ranks have equally many."""
        n = len(self.dataset)
        return n // self.world_size if self.is_training else -(-n // self.world_size)

    def __len__(self) -> int:
        batches, rest = divmod(self._share(), self.batch_size)
        return batches + bool(rest and (not self.is_training or not batches))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        n = len(self.dataset)
        boxes = torch.zeros(n, 0, 4, dtype=torch.long)
        top, left = (torch.full((n,), round(margin / 2)) for margin in self.margin)
        if self.is_training:
            # drawn on the CPU, so that no device has an order of its own, and sent over once an epoch
            generator = torch.Generator().manual_seed(
                random.Random(f'{self.dataset.seed}/{self.dataset.epoch}').getrandbits(32)
            )
            order = torch.randperm(n, generator=generator)[: self._share() * self.world_size]
        else:
            order = torch.arange(self._share() * self.world_size) % n  # as timm does, the first fill up the last share
        window = torch.arange(n)
        if self.augment:
            top, left = (torch.randint(0, margin + 1, (n,), generator=generator) for margin in self.margin)
            window += n * (torch.rand(n, generator=generator) < self.hflip)
            if self.erasing is not None:
                boxes = self.erasing.draw(n, *self.windows.shape[3:5], generator)
        mine = order[self.rank :: self.world_size]
        draws = [t[mine].to(self.device) for t in (window, top, left, boxes)]
        targets = self.targets[mine.to(self.device)]
        for i in range(len(self)):
            batch = slice(i * self.batch_size, (i + 1) * self.batch_size)
            input, target = self._load(*(t[batch] for t in draws)), targets[batch]
            if self.mixup is not None:  # soft targets also where it is not enabled, as timm's
                even = len(target) // 2 * 2  # timm's mixup pairs images; only a last batch can be odd
                if not even:
                    raise UserError('mixup and cutmix pair images, and there is one to train on; leave them out')
                # not FastCollateMixup's own, which is for batches that are yet to be collated
                input, target = Mixup.__call__(self.mixup, input[:even], target[:even])
            yield input, target

    def _load(self, *draws: torch.Tensor) -> torch.Tensor:
        if self._compiled:
            try:
                return self._compiled(*draws)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:  # torch.compile's own kinds are of it
                _logger.warning(f'the loader runs without torch.compile, slower: {" ".join(str(e).split())[:200]}')
                self._compiled = None
        return self._gather(*draws)

    def _gather(self, window: torch.Tensor, top: torch.Tensor, left: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        input = self.windows[window, top, left]
        flat = input.view(len(input), -1).float().sub_(self.mean).div_(self.std)
        input = flat.view(input.shape).permute(0, 3, 1, 2)
        if self.erasing is not None:
            input = self.erasing(input, boxes)
        return input.to(self.img_dtype)
