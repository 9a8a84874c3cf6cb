"""Data sets held in memory as uint8, and loaders that keep them on the device.

dataset = load_dataset("fashion_mnist", data_dir="data", validation_size=5000)
loader = DeviceLoader(dataset.train, batch_size=128, normalization=dataset.normalization, shuffle=True)
for inputs, labels in loader.epoch(0):
    ...
"""

from ide_snn.data.augment import Augmentation
from ide_snn.data.base import Dataset, Normalization, to_input
from ide_snn.data.image import LoadedImage, load_image
from ide_snn.data.loader import DeviceLoader
from ide_snn.data.registry import DATASETS, load_dataset
from ide_snn.data.splits import EventSplit, Split
from ide_snn.data.torch_loader import TorchLoader
from ide_snn.files import DataError

__all__ = [
    "DATASETS",
    "Augmentation",
    "DataError",
    "Dataset",
    "DeviceLoader",
    "EventSplit",
    "LoadedImage",
    "Normalization",
    "Split",
    "TorchLoader",
    "load_dataset",
    "load_image",
    "to_input",
]
