"""fourbyeight: 4-bit weights by 8-bit activations for Hugging Face decoder checkpoints.

For example:

    from quant import LLM, SamplingParams, quantize

    quantize("Qwen/Qwen3-8B", "Qwen3-8B-w4afp8", scheme="w4afp8")
    LLM("Qwen3-8B-w4afp8").generate(["Hello"], SamplingParams(temperature=0.0))
"""

from importlib.metadata import PackageNotFoundError, version

from quant.calibration.quantize import quantize
from quant.errors import RequestError, WorkFailed
from quant.recipe import Recipe, load_recipe
from quant.runtime.llm import LLM
from quant.runtime.sampling import SamplingParams

__all__ = [
    "LLM",
    "Recipe",
    "RequestError",
    "SamplingParams",
    "WorkFailed",
    "load_recipe",
    "quantize",
]

try:
    __version__ = version("fourbyeight")
except PackageNotFoundError:  # run from a source tree without installing it
    __version__ = "0+source"
