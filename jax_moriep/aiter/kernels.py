"""AITER's fused kernels that are used here: which weights, sizes and tiles each one gets right.

All of them run ``silu(gate) * up`` on rows and weights of 8 bits, with sums in f32, and add bfloat16 to an
output that was zeros before. What is said of them was seen on a simulated MI300X (docs/rocm.md). Neither the
kernels nor AITER's own host code check any of it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib

import jax

from jax_moriep.aiter import code_object, wheel
from jax_moriep.errors import LibraryError
from jax_moriep.runtime import library, native_api

FOLDER = "fmoe/silu"
LEAST_HIDDEN = 512
# A pair names its row in 24 bits; bytes of w1, and of the output rows, are counted in 32.
MAX_ROWS = 2**24
MAX_BYTES = 2**32


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One code object.

    Attributes:
      name: of the file, without its ending.
      tile: columns of the intermediate size that a work-group has; the size must be a multiple of it.
      hidden_step: the hidden size must be a multiple of it.
      digest: the first digits of the file's SHA-256. A later release has another file of the same name, and
        the same name occurs in two folders.
      races: waves use the same LDS without a barrier between them, so that results are right only as long as
        they keep in step.
    """

    name: str
    tile: int
    hidden_step: int
    digest: str
    races: bool = False

    @property
    def symbol(self) -> str:
        """The kernel's name in the code object."""
        return f"_ZN5aiter{len(self.name)}{self.name}E"


def _family(name: str, hidden_step: int, digests: dict[int, str], races: bool = False) -> list[Kernel]:
    return [Kernel(f"{name}_32x{tile}", tile, hidden_step, d, races) for tile, d in digests.items()]


# Where several kernels fit, the first is taken.
KERNELS: dict[str, list[Kernel]] = {
    "fp8_block": _family(
        "fmoe_bf16_blockscaleFp8_g1u1_novs_silu_1tg", 512, {256: "a7139c406a69d89e"}, races=True
    ),
    # First those that AITER's own tables name, of which the one for 128 columns reads LDS that nothing wrote.
    "fp8_token": [
        *_family(
            "fmoe_bf16_pertokenFp8_g1u1_vs_silu_1tg",
            512,
            {
                512: "20b112064e75ed2b",
                448: "31d21133ce8bb6ab",
                384: "04c2cb16394f8ade",
                320: "2b6145d6248ecb22",
                256: "3993d3f9b9d87629",
                192: "ce14595090b34efc",
            },
        ),
        *_family(
            "fmoe_bf16_pertokenFp8_g1u1_silu_1tg",
            256,
            {
                512: "4d044bc02f98087a",
                448: "3345f72afbf09f25",
                384: "a176836ccbf45719",
                320: "baf1a224d54da98e",
                256: "9439b43fabd25676",
                192: "f710f3837177c2d7",
                128: "f8a1eb413adb2dbe",
            },
        ),
    ],
    "int8_token": _family(
        "fmoe_bf16_pertokenInt8_g1u1_vs_silu_1tg",
        256,
        {
            512: "f295c07600217d10",
            448: "b125d5bb8e07f8e9",
            384: "868aef8a5b3f4933",
            320: "1c09429460066a83",
            256: "049479f608812b60",
            192: "1c444aa8a642a278",
            128: "9d4a2cbcaa6fbfb3",
        },
    ),
}
"""By scheme, the widest tile first."""


def choose(scheme: str, hidden_size: int, intermediate_size: int) -> Kernel | str:
    """The kernel for a scheme and sizes, or what is wrong with them.

    Args:
      scheme: a name in ``KERNELS``.
      hidden_size: H.
      intermediate_size: I.
    """
    steps = sorted({kernel.hidden_step for kernel in KERNELS[scheme]})
    if hidden_size < LEAST_HIDDEN or hidden_size % steps[0]:
        return (
            f"its {scheme} kernels get hidden_size={hidden_size} wrong, which must be a multiple of "
            f"{steps[0]} and at least {LEAST_HIDDEN}"
        )
    fitting = [
        kernel
        for kernel in KERNELS[scheme]
        if hidden_size % kernel.hidden_step == 0 and intermediate_size % kernel.tile == 0
    ]
    if fitting:
        return max(fitting, key=lambda kernel: kernel.tile)
    tiles = sorted({kernel.tile for kernel in KERNELS[scheme]})
    return (
        f"its {scheme} kernels get intermediate_size={intermediate_size} wrong, which must be a multiple of "
        f"{tiles[0] if len(tiles) == 1 else f'one of {tiles}'}"
    )


@functools.cache
def load(backend: str, kernel: Kernel) -> None:
    """Loads a kernel on all of this process's GPUs, for the custom calls of a library of ours.

    Args:
      backend: the library, "rocm" or "mori".
      kernel: one of ``KERNELS``.

    Raises:
      LibraryError: there is no amd-aiter, its file is another one, or a device does not load it.
    """
    image = read(kernel)
    function = library.load(backend).moriep_aiter_load
    text, i64 = ctypes.c_char_p, ctypes.c_int64
    function.restype = ctypes.c_int32
    function.argtypes = [ctypes.c_int32, text, text, text, text, i64]
    for device in jax.local_devices(backend="gpu"):
        ordinal = device.local_hardware_id
        names = (kernel.name.encode(), image, kernel.symbol.encode())
        native_api.call(function, ordinal, *names)


def read(kernel: Kernel) -> bytes:
    """A kernel's code object from the installed wheel, compared with what was tested.

    Raises:
      LibraryError: there is no amd-aiter, or its file is another one.
    """
    found = wheel.find()
    path = found.folder / FOLDER / f"{kernel.name}.co"
    if not path.is_file():
        raise LibraryError(f"amd-aiter {found.version} must hold {path}; {wheel.INSTALL}")
    image = path.read_bytes()
    if not hashlib.sha256(image).hexdigest().startswith(kernel.digest):
        raise LibraryError(
            f"{path} of amd-aiter {found.version} must be the file of version {wheel.VERSION}, whose results "
            f"were tested; {wheel.INSTALL}"
        )
    code_object.check(path, image, kernel.symbol)
    return image
