"""Writes stubs for what the installed ROCm wheels import and the simulator does not serve.

Usage: generate_stubs.py OUTPUT LIBRARY...   The libraries are those of the wheels. Written are:

- ``hip_stubs.c`` and ``hip.map``: the HIP calls, as weak functions that the runtime's own replace, and the
  symbol versions of all of them;
- ``rccl_stubs.c``: the calls of RCCL, as such weak functions too;
- ``<library>.c`` and ``<library>.map`` for each other ROCm library that the wheels need;
- ``stubs.cmake``, which lists the latter.

Every stub says its name on stderr and returns an error, so that a call that nobody simulates is noticed.
"""

import collections
import re
import subprocess
import sys
from pathlib import Path

HIP = "libamdhip64.so.7"
HIP_NOT_SUPPORTED = 801
RCCL = "librccl.so.1"
NCCL_INTERNAL_ERROR = 3

# Libraries whose symbols have no versions, by the beginnings of their symbols' names.
UNVERSIONED = {
    "hipblasLt": "libhipblaslt.so.1",
    "hipfft": "libhipfft.so.0",
    "nccl": RCCL,
    "rocblas_": "librocblas.so.5",
    "rocprofiler_": "librocprofiler-sdk.so.1",
    "rsmi_": "librocm_smi64.so.1",
}
# The simulator has its own of these: collectives/ and rocm_smi.cc.
SERVED = {RCCL, "librocm_smi64.so.1"}

# What any other call of a library returns: its "not implemented" or nearest.
ERRORS = {
    "libMIOpen.so.1": 7,  # miopenStatusUnknownError
    "libhipblaslt.so.1": 7,  # HIPBLAS_STATUS_NOT_SUPPORTED
    "libhipfft.so.0": 16,  # HIPFFT_NOT_SUPPORTED
    "libhsa-runtime64.so.1": 0x1000,  # HSA_STATUS_ERROR
    "librocblas.so.5": 2,  # rocblas_status_not_implemented
    "librocprofiler-sdk.so.1": 1,  # ROCPROFILER_STATUS_ERROR
}
# Calls that succeed and do nothing: XLA makes a handle of each library for every device before it compiles
# anything at all, and gives up when it gets none. What is then asked of a handle fails.
SUCCEED = {
    "miopenCreateWithStream",
    "miopenDestroy",
    "miopenSetStream",
    "rocblas_create_handle",
    "rocblas_destroy_handle",
    "rocblas_set_atomics_mode",
    "rocblas_set_stream",
    "rocblas_get_stream",
    "hipblasLtCreate",
    "hipblasLtDestroy",
    # XLA offers itself as a profiler before anybody asks it to trace.
    "rocprofiler_force_configure",
}
# Calls that return a text. They are made to describe an error that another stub has reported.
TEXTS = {"rocprofiler_get_status_string"}

# The simulator's own function of that name replaces the stub.
WEAK = '__attribute__((weak, visibility("default"))) '

PREAMBLE = """#include <stdio.h>

static int not_simulated(const char* call, int error) {{
  fprintf(stderr, "rocm-sim: %s of {library} is not simulated\\n", call);
  return error;
}}

"""


def readelf(*arguments: str) -> list[str]:
    done = subprocess.run(["readelf", "-W", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def version_needs(library: str) -> dict[int, tuple[str, str]]:
    """Maps the numbers of a library's version-needs table to (library, version)."""
    needs = {}
    needed = None
    for line in readelf("-V", library):
        if match := re.search(r"\bFile: (\S+)", line):
            needed = match[1]
        elif match := re.search(r"\bName: (\S+)\s+Flags: .*Version: (\d+)", line):
            needs[int(match[2])] = (needed, match[1])
    return needs


def imports(library: str) -> list[tuple[str, str, str]]:
    """The (library, version, symbol) of the ROCm symbols that a library imports; version may be empty."""
    needs = version_needs(library)
    found = []
    for line in readelf("--dyn-syms", library):
        match = re.search(r"\bUND ([^@\s]+)(?:@\S+ \((\d+)\))?\s*$", line)
        if not match:
            continue
        symbol, number = match[1], match[2]
        if number is not None:
            if int(number) in needs:
                found.append((*needs[int(number)], symbol))
            continue
        for prefix, owner in UNVERSIONED.items():
            if symbol.startswith(prefix):
                found.append((owner, "", symbol))
    return found


def version_key(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def version_script(versions: dict[str, set[str]], wildcard: str = "") -> str:
    """A linker's version script. The first version also takes what matches the wildcard."""
    nodes = []
    previous = ""
    for version in sorted(versions, key=version_key):
        symbols = "".join(f" {symbol};" for symbol in sorted(versions[version]))
        rest = f" {wildcard}local: *;" if not previous else ""
        nodes.append(f"{version} {{ global:{symbols}{rest} }} {previous};\n")
        previous = version
    return "".join(nodes)


def stubs(library: str, symbols: set[str], error: int, attribute: str = "") -> str:
    text = PREAMBLE.format(library=library)
    for symbol in sorted(symbols):
        if symbol in TEXTS:
            text += f'{attribute}const char* {symbol}(void) {{ return "not simulated"; }}\n'
            continue
        body = "return 0;" if symbol in SUCCEED else f'return not_simulated("{symbol}", {error});'
        text += f"{attribute}int {symbol}(void) {{ {body} }}\n"
    return text


def main(output: Path, libraries: list[str]) -> None:
    wanted = collections.defaultdict(lambda: collections.defaultdict(set))
    for library in libraries:
        for owner, version, symbol in imports(library):
            wanted[owner][version].add(symbol)
    output.mkdir(parents=True, exist_ok=True)

    hip = wanted[HIP]
    names = set().union(*hip.values())
    (output / "hip_stubs.c").write_text(stubs(HIP, names, HIP_NOT_SUPPORTED, WEAK))
    (output / "hip.map").write_text(version_script(hip, "hip*; __hip*; "))
    (output / "rccl_stubs.c").write_text(stubs(RCCL, wanted[RCCL][""], NCCL_INTERNAL_ERROR, WEAK))

    made = []
    for library, error in ERRORS.items():
        versions = wanted[library]
        names = set().union(*versions.values())
        if not names:
            continue
        made.append(library)
        (output / f"{library}.c").write_text(stubs(library, names, error))
        script = "" if "" in versions else version_script(versions)
        (output / f"{library}.map").write_text(script)
    unserved = set(UNVERSIONED.values()) - set(ERRORS) - SERVED
    assert not unserved, f"no error is known for {unserved}"
    (output / "stubs.cmake").write_text(f"set(ROCM_SIM_STUBS {' '.join(made)})\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
