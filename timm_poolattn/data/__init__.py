from .loader import BatchErasing, ResidentDataset, ResidentLoader
from .source import ImageData, cache_dir, list_classes, load_images

__all__ = ['BatchErasing', 'ImageData', 'ResidentDataset', 'ResidentLoader', 'cache_dir', 'list_classes', 'load_images']
