"""MARS-AdamW and MARS-Lion on a CPU in one pass over memory, in C that is compiled at first use.

A step on a CPU costs what it moves. Bytes a float32 parameter: fused AdamW reads 16 and writes 12.
MARS-AdamW reads 20 and writes 16, MARS-Lion reads 16 and writes 12, and the norms that the clip
needs read 4 or 8 before (docs/optimizers/mars.md).
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparring.optimizers.adamw import Settings

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("mars.c")
_REALS = {torch.float32: ("float", ctypes.c_float), torch.float64: ("double", ctypes.c_double)}
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_WHOLE = 1 << 18
"""Tensors below this many elements are one thread's work."""


class NormCache:
    """Norms of tensors, known until the tensor is written to; else infinity."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, int, float]] = {}

    def get(self, tensor: Tensor) -> float:
        held = self._found.get(id(tensor))
        if held is None or held[0] is not tensor or held[1] != tensor._version:
            return math.inf
        return held[2]

    def put(self, tensor: Tensor, norm: float) -> None:
        self._found[id(tensor)] = (tensor, tensor._version, norm)


class Kernel:
    """The compiled functions for one floating type; tensors are contiguous and on the CPU."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        real, pointer, count = _REALS[dtype][1], ctypes.c_void_p, ctypes.c_int64
        self._square_sums = library.square_sums
        self._mars_adamw = library.mars_adamw
        self._mars_lion = library.mars_lion
        self._square_sums.argtypes = [count, pointer, pointer, real, pointer]
        self._mars_adamw.argtypes = [count, *[pointer] * 6, *[real] * 8]
        self._mars_lion.argtypes = [count, *[pointer] * 4, *[real] * 5]
        for function in (self._square_sums, self._mars_adamw, self._mars_lion):
            function.restype = None

    def norm(self, tensor: Tensor) -> float:
        """Euclidean norm."""
        return self._norms(tensor, None, 0.0)[0]

    def norms(self, grad: Tensor, last_grad: Tensor, coefficient: float) -> tuple[float, float]:
        """|g| and |g + kappa (g - h)|, in one pass and without writing the vector."""
        return self._norms(grad, last_grad, coefficient)

    def _norms(self, grad: Tensor, last: Tensor | None, coefficient: float) -> tuple[float, float]:
        def part(offset: int, count: int) -> tuple[float, float]:
            sums = (ctypes.c_double * 2)()
            places = [None if v is None else _at(v, offset) for v in (grad, last)]
            self._square_sums(count, *places, coefficient, sums)
            return sums[0], sums[1]

        own, corrected = zip(*_spread(grad.numel(), part), strict=True)
        return math.sqrt(sum(own)), math.sqrt(sum(corrected))

    def adamw(
        self,
        param: Tensor,
        grad: Tensor,
        last_grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None,
        number: float,
        settings: Settings,
        *,
        coefficient: float,
        scale: float,
    ) -> None:
        """MARS-AdamW: correct, scale, update and remember the gradient.

        Args:
            max_exp_avg_sq: amsgrad's.
            number: of the step, from 1.
            coefficient: kappa.
            scale: factor on c, 1 / max(1, |c|).
        """
        lr, beta1, beta2, eps = float(settings.lr), settings.beta1, settings.beta2, settings.eps
        decay, size = 1 - lr * settings.weight_decay, lr / (1 - beta1**number)
        root = 1 / math.sqrt(1 - beta2**number)
        held = (param, grad, last_grad, exp_avg, exp_avg_sq, max_exp_avg_sq)
        numbers = (coefficient, scale, beta1, beta2, decay, size, root, eps)
        self._call(self._mars_adamw, held, numbers)

    def lion(
        self,
        param: Tensor,
        grad: Tensor,
        last_grad: Tensor,
        exp_avg: Tensor,
        settings: Settings,
        *,
        coefficient: float,
        scale: float,
    ) -> None:
        """MARS-Lion; arguments as :meth:`adamw`'s."""
        lr = float(settings.lr)
        decay = 1 - lr * settings.weight_decay
        held = (param, grad, last_grad, exp_avg)
        self._call(self._mars_lion, held, (coefficient, scale, settings.beta1, decay, lr))

    def _call(
        self, function: Any, held: tuple[Tensor | None, ...], numbers: tuple[float, ...]
    ) -> None:
        """Tensors are the parameter, its gradient, and what else is written to."""

        def part(offset: int, count: int) -> None:
            function(count, *(None if v is None else _at(v, offset) for v in held), *numbers)

        param = held[0]
        assert param is not None
        _spread(param.numel(), part)
        # What autograd and NormCache know of a change in place.
        written = [v for v in (param, *held[2:]) if v is not None]
        torch.autograd.graph.increment_version(written)


@cache
def kernel(dtype: torch.dtype) -> Kernel | None:
    """The kernel for a type; None, with a line in the log, where it cannot be compiled."""
    if dtype not in _REALS:
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        logger.info("MARS: no C compiler (cc, gcc or $CC): library calls instead of the kernel")
        return None
    try:
        return Kernel(_compiled([*compiler.split(), *_FLAGS, f"-DREAL={_REALS[dtype][0]}"]), dtype)
    except (subprocess.CalledProcessError, OSError) as error:
        reason = str(getattr(error, "stderr", "") or error).strip()
        logger.info("MARS: library calls instead of the kernel, as %s failed: %s", compiler, reason)
        return None


def _compiled(command: list[str]) -> ctypes.CDLL:
    # In a folder of this process, though it takes 0.2 s: a shared one would need locks, and on a
    # cluster it would hold another machine's instructions.
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "mars.so"
        subprocess.run(
            [*command, str(_SOURCE), "-lm", "-o", str(library)],
            check=True,
            capture_output=True,
            text=True,
        )
        return ctypes.CDLL(str(library))


def _at(tensor: Tensor, offset: int) -> int:
    return tensor.data_ptr() + offset * tensor.element_size()


Part = TypeVar("Part")


def _spread(size: int, work: Callable[[int, int], Part]) -> list[Part]:
    """Call ``work(offset, count)`` on torch's number of threads; results in order."""
    threads = torch.get_num_threads() if size >= _WHOLE else 1
    if threads == 1:
        return [work(0, size)]
    borders = [size * n // threads for n in range(threads + 1)]
    counts = [end - start for start, end in pairwise(borders)]
    others = _pool(threads - 1, os.getpid()).map(work, borders[1:-1], counts[1:])
    return [work(0, counts[0]), *others]


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mars")
