"""What each data set of the papers fixes: the one table of its facts."""

from typing import Any

#: Tags and what each data set fixes. An untagged name means the first tag with weights, or else the first.
DATASETS: dict[str, dict[str, Any]] = {
    'cifar10': dict(
        num_classes=10, input_size=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
    'cifar100': dict(
        num_classes=100, input_size=(3, 32, 32), mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
    ),
    'tiny_imagenet': dict(
        num_classes=200, input_size=(3, 64, 64), mean=(0.4802, 0.4481, 0.3975), std=(0.2770, 0.2691, 0.2821)
    ),
}
