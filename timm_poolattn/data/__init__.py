from .images import ImageData, list_classes, load_images
from .loader import BatchErasing, ResidentDataset, ResidentLoader
from .view import View, read_image

__all__ = [
    'BatchErasing',
    'ImageData',
    'ResidentDataset',
    'ResidentLoader',
    'View',
    'list_classes',
    'load_images',
    'read_image',
]
