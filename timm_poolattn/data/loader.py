"""A loader for data that fits on the training device: whole batches are sampled and augmented there."""

import random
from collections.abc import Iterator, Sequence

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch.nn import functional as F

from .source import ImageData


class ResidentDataset:
    """What timm's train.py holds as a data set: the images, and the epoch that the loader draws its order from.

    Args:
        data: the images and their classes.
        seed: of order and augmentation. Default: 42, train.py's.
    """

    def __init__(self, data: ImageData, seed: int = 42) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class ResidentLoader:
    """Batches of a `ResidentDataset` by timm's loader protocol: (input, target), normalised, on the device.

    Training batches are a fresh order each epoch, cropped at random from images zero-padded by `crop_padding`, and
    flipped; evaluation batches are the images in order. Order, crops and flips are a function of the data set's seed
    and epoch alone: the same on any device, and each of `world_size` ranks sees its share of the same epoch.

    input: (B, C, H, W) of `img_dtype`, channels_last in memory; target: (B,) int64, or (B, classes) after `mixup`.

    Args:
        dataset: what to load.
        input_size: (C, H, W) of the model; must be the images'.
        batch_size: B. In training the last, incomplete batch is left out as timm's loader does, unless it is the only.
        is_training: shuffle and augment.
        mean: per channel, of images in [0, 1].
        std: per channel, of images in [0, 1].
        img_dtype: dtype of the input. Default: float32.
        device: where the images are held. Default: 'cpu'.
        crop_padding: pixels on each side. Default: H // 8: 4 for 32x32, 8 for 64x64, as in the papers. 0: no crop.
        hflip: probability of a horizontal flip. Default: 0.5.
        random_erasing: timm's, applied after normalisation.
        mixup: timm's, applied last.
        rank: of this process. Default: 0.
        world_size: processes that share the data. Default: 1.

    Raises:
        ValueError: the images have another size or number of channels than `input_size`.
    """

    def __init__(
        self,
        dataset: ResidentDataset,
        input_size: Sequence[int],
        batch_size: int,
        *,
        is_training: bool,
        mean: Sequence[float],
        std: Sequence[float],
        img_dtype: torch.dtype = torch.float32,
        device: torch.device | str = 'cpu',
        crop_padding: int | None = None,
        hflip: float = 0.5,
        random_erasing: RandomErasing | None = None,
        mixup: Mixup | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        h, w, c = dataset.data.images.shape[1:]
        if tuple(input_size) != (c, h, w):
            raise ValueError(
                f'the images are {c}x{h}x{w} and the model wants {"x".join(map(str, input_size))};'
                f' give --input-size {c} {h} {w}, or use --no-resident to resize them'
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.is_training = is_training
        self.img_dtype = img_dtype
        self.device = torch.device(device)
        self.crop_padding = (h // 8 if crop_padding is None else crop_padding) if is_training else 0
        self.hflip = hflip if is_training else 0.0
        self.random_erasing = random_erasing
        self.mixup = mixup
        self.rank = rank
        self.world_size = world_size
        p = self.crop_padding
        self.images = F.pad(dataset.data.images, (0, 0, p, p, p, p)).to(self.device)  # zeros are black, unnormalised
        self.targets = dataset.data.targets.to(self.device)
        self.height, self.width = h, w
        # uint8 in, so the statistics are scaled rather than the images
        self.mean = (255 * torch.tensor(mean, dtype=torch.float32, device=self.device)).view(-1, 1, 1)
        self.std = (255 * torch.tensor(std, dtype=torch.float32, device=self.device)).view(-1, 1, 1)

    @property
    def mixup_enabled(self) -> bool:
        return self.mixup is not None and self.mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enable: bool) -> None:
        self.mixup.mixup_enabled = enable

    def _share(self) -> int:
        """Images of this rank in an epoch: all ranks have equally many."""
        n = len(self.dataset)
        return n // self.world_size if self.is_training else -(-n // self.world_size)

    def __len__(self) -> int:
        batches, rest = divmod(self._share(), self.batch_size)
        return batches + bool(rest and (not self.is_training or not batches))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        n = len(self.dataset)
        if self.is_training:
            # drawn on the CPU, so that no device has an order of its own, and sent over once an epoch
            generator = torch.Generator().manual_seed(
                random.Random(f'{self.dataset.seed}/{self.dataset.epoch}').getrandbits(32)
            )
            order = torch.randperm(n, generator=generator)
            top_left = torch.randint(0, 2 * self.crop_padding + 1, (n, 2), generator=generator)
            flip = torch.rand(n, generator=generator) < self.hflip
        else:
            order = torch.arange(self._share() * self.world_size) % n  # as timm does, the first fill up the last share
            top_left, flip = torch.zeros(n, 2, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
        mine = order[self.rank :: self.world_size].to(self.device)
        top_left, flip = top_left.to(self.device), flip.to(self.device)
        for i in range(len(self)):
            index = mine[i * self.batch_size : (i + 1) * self.batch_size]
            yield self._batch(index, top_left[index], flip[index])

    def _batch(self, index: torch.Tensor, top_left: torch.Tensor, flip: torch.Tensor):
        # crop and flip are only other rows and columns to read, so one gather does sampling, crop and flip
        rows = top_left[:, :1] + torch.arange(self.height, device=self.device)
        cols = torch.arange(self.width, device=self.device)
        cols = top_left[:, 1:] + torch.where(flip[:, None], self.width - 1 - cols, cols)
        input = self.images[index[:, None, None], rows[:, :, None], cols[:, None, :]]
        input = input.permute(0, 3, 1, 2).float().sub_(self.mean).div_(self.std).to(self.img_dtype)
        target = self.targets[index]
        if self.random_erasing is not None:
            input = self.random_erasing(input)
        if self.mixup_enabled:
            input, target = Mixup.__call__(self.mixup, input, target)  # also where it is timm's FastCollateMixup
        return input, target
