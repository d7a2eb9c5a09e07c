"""MORI's kernels for the rows in use: compiled once from the installed wheel's sources, and kept.

A **unit** is what is compiled together: the kernels of one of MORI's kernel types for rows of one type. Each
unit lies in a folder of its own, because MORI's loader takes all code objects of the folder that it is given.
A folder's name tells people what it holds and ends with a hash of everything that its contents depend on.

Processes that need the same unit at the same time wait for the first of them. The lock is the operating
system's, on an open file, so it ends with the process that holds it, however that ends; a folder appears
under its name by one rename when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jax_moriep.errors import LibraryError, rule
from jax_moriep.mori import compiler, network
from jax_moriep.mori.wheel import VERSION, Wheel
from jax_moriep.runtime import settings

SOURCE = Path(__file__).with_name("kernels.hip")
_HEADER = Path(__file__).with_name("relay.h")

# The name of a type of rows as JAX has it -> (MORI's short name, C++ type).
ROW_TYPES = {
    "float32": ("f32", "float"),
    "bfloat16": ("bf16", "hip_bfloat16"),
    "float8_e4m3fnuz": ("fp8_fnuz", "__hip_fp8_e4m3_fnuz"),
}
_COMBINE_INTRA_NODE = ("EpCombineIntraNodeKernel_{}_nop2p", "EpCombineIntraNodeKernel_{}_p2p")
_AROUND_INTER_NODE_V1 = (
    "MoriepRelay",
    "EpDispatchCopyToStaging_{}",
    "EpCombineSync_{}",
    "EpCombineSyncBarrier_{}",
    "EpCombineAll_{}",
)
# For each kernel type the kernels that its dispatch and combine launch; {} is the rows' type's short name.
KERNELS = {
    "IntraNode": ("EpDispatchIntraNodeKernel_{}", *_COMBINE_INTRA_NODE),
    "IntraNodeLL": ("EpDispatchIntraNodeLLKernel_{}", *_COMBINE_INTRA_NODE),
    "InterNode": ("EpDispatchInterNodeKernel_{}", "EpCombineInterNodeKernel_{}"),
    "InterNodeV1": (
        "EpDispatchInterNodeV1Kernel_{}",
        "EpCombineInterNodeV1Kernel_{}",
        *_AROUND_INTER_NODE_V1,
    ),
    "InterNodeV1LL": (
        "EpDispatchInterNodeV1KernelLowLatency_{}",
        "EpCombineInterNodeV1KernelLowLatency_{}",
        *_AROUND_INTER_NODE_V1,
    ),
    "AsyncLL": (
        "EpDispatchLowLatencyAsyncSendCopySlotAssign_{}",
        "EpDispatchLowLatencyAsyncSendCopyMultiBlock_{}",
        "EpDispatchLowLatencyAsyncSendTransfer_{}",
        "EpDispatchLowLatencyAsyncRecvTransfer_{}",
        "EpDispatchLowLatencyAsyncRecvCopyMultiBlock_{}",
        "EpCombineLowLatencyAsyncSendCopy_{}",
        "EpCombineLowLatencyAsyncSendTransfer_{}",
        "EpCombineLowLatencyAsyncRecvTransfer_{}",
        "EpCombineLowLatencyAsyncRecvCopy_{}",
    ),
}
# Kernels of these types stay on one machine, so they do not depend on how a network adapter is driven.
ONE_NODE = ("IntraNode", "IntraNodeLL")
# The macros by which MORI's sources choose how the GPU drives an adapter; mlx5 is what they take without one.
_ADAPTERS = {"mlx5": (), "bnxt": ("-DMORI_DEVICE_NIC_BNXT",), "ionic": ("-DMORI_DEVICE_NIC_IONIC",)}
_EM_AMDGPU = 224


@dataclasses.dataclass(frozen=True, order=True)
class Unit:
    """What is compiled together.

    Attributes:
      kernel: MORI's kernel type, a name in ``KERNELS``.
      rows: the type of the rows' values, a name in ``ROW_TYPES``.
    """

    kernel: str
    rows: str

    @property
    def symbols(self) -> tuple[str, ...]:
        """The names of its kernels."""
        return tuple(name.format(ROW_TYPES[self.rows][0]) for name in KERNELS[self.kernel])

    def label(self, arch: str) -> str:
        """The first part of its folder's name, the same for all compilers."""
        way = "" if self.kernel in ONE_NODE else f"-{_network()}"
        return f"{self.kernel}-{ROW_TYPES[self.rows][0]}-{arch}-{VERSION}{way}"


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``mori`` in ``JAX_MORIEP_CACHE_DIR`` or in the user's cache folder."""
    named = settings.CACHE_DIR.value()
    if named is not None:
        return named / "mori"
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "jax_moriep" / "mori"


def obtain(
    wheel: Wheel, arch: str, units: Sequence[Unit], progress: Callable[[str], None] | None = None
) -> list[Path]:
    """Makes sure that the kernels exist, and says where.

    Args:
      wheel: whose sources are compiled, and whose libraries will load the result.
      arch: of the devices, such as "gfx942".
      units: what is needed; several are compiled side by side.
      progress: called with one line when there is something to wait for; None: a warning in the log.

    Returns:
      For each unit a folder that holds its code object and nothing else that MORI's loader takes.

    Raises:
      LibraryError: the given kernels do not fit, or there is no compiler, or it fails, or the cache cannot be
        written.
    """
    # A warning, because it is shown without any settings: who waits for a minute wants to know for what.
    say = progress or logging.getLogger(__name__).warning
    given = settings.MORI_KERNELS.value()
    if given is not None:
        return [_given(given, unit, arch) for unit in units]
    chosen = compiler.find()
    with ThreadPoolExecutor(max(1, len(units))) as pool:
        return list(pool.map(lambda unit: _compiled(wheel, chosen, arch, unit, say), units))


def _given(root: Path, unit: Unit, arch: str) -> Path:
    """The folder of a unit among kernels that the user brings, compiled by us on some machine."""
    label = unit.label(arch)
    found = sorted(root.glob(f"{label}-*/"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise LibraryError(
            rule(
                settings.MORI_KERNELS.name,
                str(root),
                f"hold one folder {label}-*, and holds {names}",
                _GIVEN_CURE,
            )
        )
    if why := _defect(found[0], unit):
        raise LibraryError(
            rule(settings.MORI_KERNELS.name, str(root), f"hold good kernels, but {why}", _GIVEN_CURE)
        )
    return found[0]


_GIVEN_CURE = (
    "copy the folder from the cache of a machine that compiled it (jax-moriep doctor names the cache), or "
    "unset the variable"
)


def _compiled(
    wheel: Wheel, chosen: compiler.Compiler, arch: str, unit: Unit, say: Callable[[str], None]
) -> Path:
    """The folder of a unit in the cache; compiles it if it is not there."""
    short, cpp_type = ROW_TYPES[unit.rows]
    options = [
        "-std=c++17",
        "-O2",
        "-D__HIP_PLATFORM_AMD__",
        "-DHIP_ENABLE_WARP_SYNC_BUILTINS",
        f"-DMORIEP_KERNEL={unit.kernel}",
        f"-DMORIEP_ROW_NAME={short}",
        f"-DMORIEP_ROW_TYPE={cpp_type}",
        *chosen.extra_options(arch),
        *(() if unit.kernel in ONE_NODE else _network_options()),
    ]
    content = [
        VERSION,
        wheel.sources_digest(),
        SOURCE.read_text(),
        _HEADER.read_text(),
        chosen.version,
        arch,
        *options,
    ]
    key = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
    root, entry = cache_folder(), f"{unit.label(arch)}-{key}"
    folder = root / entry
    if _defect(folder, unit) is None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{entry}.lock", lambda: say(f"waiting for the process that compiles {entry}")):
            if _defect(folder, unit) is None:
                return folder
            # Whoever made these had the lock and is gone.
            for left in (folder, *root.glob(f".{entry}.*")):
                shutil.rmtree(left, ignore_errors=True)
            say(f"compiling MORI's kernels {entry}, once, with {chosen.program}; they are kept in {root}")
            making = Path(tempfile.mkdtemp(prefix=f".{entry}.", dir=root))
            try:
                includes = [f"-isystem{path}" for path in wheel.include_folders]
                chosen.code_object(SOURCE, making / f"{unit.kernel}.hsaco", arch, [*options, *includes])
                if why := _defect(making, unit):
                    raise LibraryError(
                        f"{chosen.program} must compile MORI's kernels, but {why}; use a newer ROCm"
                    )
                making.chmod(0o755)
                making.rename(folder)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise LibraryError(
            f"MORI's kernels cannot be kept in {root} ({error}); set {settings.CACHE_DIR.name} to a folder "
            f"that can be written, or give compiled kernels in {settings.MORI_KERNELS.name}"
        ) from error
    return folder


@contextlib.contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a file's lock. It is not inherited by the compiler, so it ends with this process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _defect(folder: Path, unit: Unit) -> str | None:
    """What a folder lacks of a unit's kernels; None if it is good."""
    found = list(folder.glob("*.hsaco"))
    if len(found) != 1:
        return f"{folder} holds {len(found)} code objects and not one"
    data = found[0].read_bytes()
    # An ELF file for an AMD GPU whose last part, the table of sections, is there.
    if data[:5] != b"\x7fELF\x02" or len(data) < 64:
        return f"{found[0]} is no ELF file"
    machine = struct.unpack_from("<H", data, 18)[0]
    table, (size, count) = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<HH", data, 58)
    if machine != _EM_AMDGPU or table + size * count > len(data):
        return f"{found[0]} is no complete code object of an AMD GPU"
    missing = [name for name in unit.symbols if f"\0{name}.kd\0".encode() not in data]
    return f"{found[0]} lacks the kernels {', '.join(missing)}" if missing else None


def _network() -> str:
    """How kernels reach the network adapters, for a folder's name: their maker's way, or MORI's thread."""
    named = os.environ.get(network.MAKER_VARIABLE, "").lower() or _commonest_adapter()
    if named not in _ADAPTERS:
        cure = "pick one of these, or unset the variable"
        raise LibraryError(rule("MORI_DEVICE_NIC", named, f"be one of {', '.join(_ADAPTERS)}", cure))
    return f"{named}_proxy" if _by_proxy() else named


def _network_options() -> tuple[str, ...]:
    maker = _network().removesuffix("_proxy")
    return (*_ADAPTERS[maker], *(("-DMORI_PROXY_ENABLED",) if _by_proxy() else ()))


def _by_proxy() -> bool:
    return network.by_proxy(os.environ, network.adapters())[0]


def _commonest_adapter(root: Path = Path("/sys/class/infiniband")) -> str:
    """The maker of most adapters of this machine, by their drivers; mlx5 if there are none."""
    drivers = network.adapters(root)
    counts = {maker: sum(name.startswith(maker) for name in drivers) for maker in _ADAPTERS}
    return max(_ADAPTERS, key=counts.__getitem__)
