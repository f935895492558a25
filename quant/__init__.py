"""fourbyeight: 4-bit weights by 8-bit activations for Hugging Face decoder checkpoints."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fourbyeight")
except PackageNotFoundError:  # run from a source tree without installing it
    __version__ = "0+source"
