from .images import ImageData, list_classes, load_images
from .loader import BatchErasing, ResidentDataset, ResidentLoader

__all__ = ['BatchErasing', 'ImageData', 'ResidentDataset', 'ResidentLoader', 'list_classes', 'load_images']
