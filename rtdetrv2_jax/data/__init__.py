"""Data sets: samples from COCO, Pascal VOC and YOLO files found by looking, or from scenes drawn here."""

from rtdetrv2_jax.data.dataset import Classes, FileDataset
from rtdetrv2_jax.data.faults import DataError, Fault, fault_table
from rtdetrv2_jax.data.headers import check_images
from rtdetrv2_jax.data.opening import open_dataset
from rtdetrv2_jax.data.sample import Dataset, Sample
from rtdetrv2_jax.data.synthetic import SyntheticDataset

__all__ = [
    "Classes",
    "DataError",
    "Dataset",
    "Fault",
    "FileDataset",
    "Sample",
    "SyntheticDataset",
    "check_images",
    "fault_table",
    "open_dataset",
]
