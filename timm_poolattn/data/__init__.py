from .images import ImageData, ImageFiles, list_classes, load_images
from .loader import BatchErasing, ResidentDataset, ResidentLoader
from .view import View, evaluation_config, open_image, read_image, to_channels

__all__ = [
    'BatchErasing',
    'ImageData',
    'ImageFiles',
    'ResidentDataset',
    'ResidentLoader',
    'View',
    'evaluation_config',
    'list_classes',
    'load_images',
    'open_image',
    'read_image',
    'to_channels',
]
