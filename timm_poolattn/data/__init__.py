from .loader import ResidentDataset, ResidentLoader
from .source import ImageData, cache_dir, load_images

__all__ = ['ImageData', 'ResidentDataset', 'ResidentLoader', 'cache_dir', 'load_images']
