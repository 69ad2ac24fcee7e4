"""What each data set of the papers fixes: the one table of its facts."""

from typing import Any

_CIFAR100 = [
    'apple', 'aquarium_fish', 'baby', 'bear', 'beaver', 'bed', 'bee', 'beetle', 'bicycle', 'bottle', 'bowl', 'boy',
    'bridge', 'bus', 'butterfly', 'camel', 'can', 'castle', 'caterpillar', 'cattle', 'chair', 'chimpanzee', 'clock',
    'cloud', 'cockroach', 'couch', 'crab', 'crocodile', 'cup', 'dinosaur', 'dolphin', 'elephant', 'flatfish',
    'forest', 'fox', 'girl', 'hamster', 'house', 'kangaroo', 'keyboard', 'lamp', 'lawn_mower', 'leopard', 'lion',
    'lizard', 'lobster', 'man', 'maple_tree', 'motorcycle', 'mountain', 'mouse', 'mushroom', 'oak_tree', 'orange',
    'orchid', 'otter', 'palm_tree', 'pear', 'pickup_truck', 'pine_tree', 'plain', 'plate', 'poppy', 'porcupine',
    'possum', 'rabbit', 'raccoon', 'ray', 'road', 'rocket', 'rose', 'sea', 'seal', 'shark', 'shrew', 'skunk',
    'skyscraper', 'snail', 'snake', 'spider', 'squirrel', 'streetcar', 'sunflower', 'sweet_pepper', 'table', 'tank',
    'telephone', 'television', 'tiger', 'tractor', 'train', 'trout', 'tulip', 'turtle', 'wardrobe', 'whale',
    'willow_tree', 'wolf', 'woman', 'worm',
]  # fmt: skip

#: By tag. `title` is the name as printed, `hub_id` the Hub's, `torchvision` timm's of torchvision's files, `classes`
#: their names in order. A model's name without a tag means the first with weights, or else the first.
DATASETS: dict[str, dict[str, Any]] = {
    'cifar10': dict(
        title='CIFAR-10',
        hub_id='uoft-cs/cifar10',
        torchvision='torch/cifar10',
        num_classes=10,
        classes=['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'],
        input_size=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        train_images=50_000,
    ),
    'cifar100': dict(
        title='CIFAR-100',
        hub_id='uoft-cs/cifar100',
        torchvision='torch/cifar100',
        num_classes=100,
        classes=_CIFAR100,
        input_size=(3, 32, 32),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        train_images=50_000,
    ),
    'tiny_imagenet': dict(
        title='Tiny ImageNet',
        hub_id='zh-plus/tiny-imagenet',
        num_classes=200,
        input_size=(3, 64, 64),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        train_images=100_000,
    ),
}
