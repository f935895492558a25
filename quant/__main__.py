"""`python -m quant` is the command `quantize`."""

from quant.cli import main

main()
