"""From the rows of a split to tensors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


def tensors(split: "Dataset", columns: Sequence[str] | None = None) -> dict[str, "torch.Tensor"]:
    """Columns of a split as tensors in memory, in row order.

    Args:
        split: rows of a loaded data set.
        columns: column names; all by default.

    Returns:
        Numbers (N,) as int64 or float32 (missing values NaN), lists of fixed length (N, D) as float32 or int64, images
        (N, C, H, W) as uint8, text as one (bytes,) uint8 tensor with a zero byte between rows.

    Raises:
        ValueError: no such column, or one that has no tensor form.
    """
    names = split.column_names if columns is None else list(columns)
    unknown = [name for name in names if name not in split.column_names]
    if unknown:
        raise ValueError(f"columns={unknown}: must be among {', '.join(split.column_names)}")
    return {name: _column(split, name) for name in names}


def _column(split: "Dataset", name: str) -> "torch.Tensor":
    import datasets
    import pyarrow as pa
    import torch

    feature = split.features[name]
    if isinstance(feature, datasets.Image):
        return _images(split, name)
    column = split.with_format("arrow")[:][name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if column.null_count:
            raise ValueError(f"columns={name}: text with {column.null_count} missing rows has no tensor form")
        return text_bytes(column.to_pylist())
    width = None
    if pa.types.is_fixed_size_list(kind):
        width, column = kind.list_size, column.flatten()
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        raise ValueError(f"columns={name}: a column of type {kind} has no tensor form")
    whole = not pa.types.is_floating(column.type) and column.null_count == 0
    values = column.cast(pa.int64() if whole else pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    tensor = torch.tensor(values, dtype=torch.int64 if whole else torch.float32)  # a copy, arrow's memory is read-only
    return tensor if width is None else tensor.view(-1, width)


def _images(split: "Dataset", name: str) -> "torch.Tensor":
    """Decoded images of one size, (N, C, H, W) uint8."""
    import numpy as np
    import torch

    decoded = [np.asarray(image) for image in split[name]]
    sizes = {image.shape for image in decoded}
    if len(sizes) != 1:
        raise ValueError(f"columns={name}: images differ in size ({len(sizes)} sizes); crop them to one first")
    stacked = torch.from_numpy(np.stack(decoded))
    return (stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)).contiguous()


def text_bytes(rows: Sequence[str]) -> "torch.Tensor":
    """UTF-8 bytes of all rows, one zero byte between them: (bytes,) uint8."""
    import torch

    joined = "\0".join(rows).encode()
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)


def normalise(images: "torch.Tensor", mean: Sequence[float], std: Sequence[float]) -> "torch.Tensor":
    """Scale uint8 images to [0, 1], then subtract the mean and divide by the standard deviation of each channel.

    Args:
        images: (N, C, H, W) uint8.
        mean: C values in [0, 1].
        std: C values > 0.

    Returns:
        (N, C, H, W) float32.

    Raises:
        TypeError: images are not uint8 (they may have been normalised before).
        ValueError: `mean` or `std` has not C values.
    """
    import torch

    if images.dtype != torch.uint8:
        raise TypeError(f"images.dtype={images.dtype}: must be torch.uint8")
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean={list(mean)}, std={list(std)}: must have {channels} values, one a channel")
    shape: Any = (1, channels, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def standardise(train: "torch.Tensor", *others: "torch.Tensor") -> tuple["torch.Tensor", ...]:
    """Columns at mean 0 and standard deviation 1 of the *training* rows; missing values are left out and stay NaN.

    Args:
        train: (N, D) float32.
        others: further splits (M, D), scaled by the training statistics.

    Returns:
        `train` and `others`, scaled; a constant column becomes 0.
    """
    import torch

    mean = train.nanmean(0)
    variance = (train - mean).square().nanmean(0)
    scale = torch.where(variance > 0, variance.rsqrt(), torch.zeros_like(variance))
    return tuple((part - mean) * scale for part in (train, *others))
