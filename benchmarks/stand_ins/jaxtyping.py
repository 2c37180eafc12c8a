"""Enough of jaxtyping to run our code where it is not installed: annotations say the array's type and no shape."""

from typing import Any

import jax
from jax.typing import DTypeLike as DTypeLike

Array = jax.Array
PRNGKeyArray = jax.Array
ScalarLike = Any


class _Shaped:
    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


class Bool(_Shaped): ...


class Float(_Shaped): ...


class Float32(_Shaped): ...


class Float64(_Shaped): ...


class Int(_Shaped): ...


class Int32(_Shaped): ...


class Int64(_Shaped): ...


class Real(_Shaped): ...


class UInt8(_Shaped): ...
