"""Find and load the shared libraries. They have a C ABI, so that one build serves every torch.

A library is looked for in these folders, first hit wins:

1. `$QUANT_LIB_DIR`, and then nowhere else: who names a folder wants that build or an error;
2. `lib/` of the installed package (wheel or editable install);
3. `build/*/` of a source tree, newest build first.
"""

import ctypes
import functools
import os
from pathlib import Path

import quant_kernels

SOURCE_TREE = Path(__file__).resolve().parents[2]


class LibraryMissing(RuntimeError):
    """A shared library is not there, or cannot be used. The message says what to run."""


def search_folders(name: str) -> list[Path]:
    """The folders in which `lib{name}.so` is looked for, in order; they need not exist."""
    if chosen := os.environ.get("QUANT_LIB_DIR"):
        return [Path(chosen)]
    folders = [Path(folder) / "lib" for folder in quant_kernels.__path__]
    if _in_source_tree():
        builds = [file for file in SOURCE_TREE.glob(f"build/*/lib{name}.so") if file.is_file()]
        builds.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        folders += [file.parent for file in builds] or [SOURCE_TREE / "build" / "*"]
    return folders


def find(name: str) -> Path | None:
    """The file of library `name` ("quant_cpu", "quant_cuda", "quant_cutlass"), or None."""
    for folder in search_folders(name):
        file = folder / f"lib{name}.so"
        if file.is_file():
            return file
    return None


@functools.cache
def load(name: str, abi: int) -> ctypes.CDLL:
    """Library `name`, once `{name}_abi_version()` has answered `abi`.

    Raises LibraryMissing where it is not found, does not load, or has another ABI.
    """
    file = find(name)
    if file is None:
        looked = "".join(f"\n  {folder}" for folder in search_folders(name))
        raise LibraryMissing(f"lib{name}.so was not found in{looked}\n{_how_to_build(name)}")
    try:
        library = ctypes.CDLL(str(file))
        found = int(library[f"{name}_abi_version"]())
    except (OSError, AttributeError) as error:
        raise LibraryMissing(f"{file} does not load: {error}\n{_how_to_build(name)}") from error
    if found != abi:
        raise LibraryMissing(
            f"{file} has ABI {found}, this package needs ABI {abi}: another version's build.\n"
            f"{_how_to_build(name)}"
        )
    return library


def _in_source_tree() -> bool:
    return (SOURCE_TREE / "csrc" / "CMakeLists.txt").is_file()


def _how_to_build(name: str) -> str:
    cuda = "" if name == "quant_cpu" else " QUANT_CUDA=ON"
    needs = "nvcc 12.5 or newer on PATH" if cuda else "a C++17 compiler"
    if _in_source_tree():
        # The export matters where an unusable library, installed or named, comes before build/.
        target, folder = f"native{cuda}", SOURCE_TREE / "build" / "dev"
        if name == "quant_cutlass":
            target, folder = "baseline", SOURCE_TREE / "build" / "baseline"
        command = f"make -C {SOURCE_TREE} {target} && export QUANT_LIB_DIR={folder}"
    elif name == "quant_cutlass":
        command = "make baseline (in a checkout of the sources: no package carries it)"
    else:
        define = " -C cmake.define.QUANT_CUDA=ON" if cuda else ""
        command = f"pip install --force-reinstall --no-deps{define} PATH_OF_THE_FOURBYEIGHT_SOURCES"
        if "QUANT_LIB_DIR" in os.environ:
            command += " && unset QUANT_LIB_DIR"
    return f"Build it (this needs {needs}) with: {command}"
