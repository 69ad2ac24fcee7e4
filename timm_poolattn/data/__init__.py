from .loader import BatchErasing, ResidentDataset, ResidentLoader
from .source import ImageData, cache_dir, load_images

__all__ = ['BatchErasing', 'ImageData', 'ResidentDataset', 'ResidentLoader', 'cache_dir', 'load_images']
