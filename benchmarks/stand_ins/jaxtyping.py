"""Enough of jaxtyping to run our code where it is not installed: annotations say the array's type and no shape."""

from typing import Any

import jax
from jax.typing import DTypeLike as DTypeLike

Array = PRNGKeyArray = jax.Array
ScalarLike = Any


class _Shaped:
    """What stands for every annotation of a shape."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


Bool = Float = Float32 = Float64 = Int = Int32 = Int64 = Real = UInt8 = _Shaped
