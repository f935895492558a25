"""libquant_cpu.so as compiled: what the loops of the GEMMs keep in registers."""

import platform
import re
import shutil
import subprocess

import pytest

from quant_kernels import cpu, native

pytestmark = pytest.mark.skipif(not cpu.available(), reason="libquant_cpu.so was not built")


def inner_loops(listing: str, function: str) -> list[list[str]]:
    """The loops without a loop inside, of functions of this name in objdump's output."""
    loops = []
    for body in re.findall(
        rf"^[0-9a-f]+ <[^\n]*{function}[^\n]*>:\n(.*?)\n\n", listing, re.M | re.S
    ):
        found = re.findall(r"^ *([0-9a-f]+):\t([^\n]*)", body, re.M)
        lines = [(int(address, 16), text) for address, text in found]
        for end, (address, text) in enumerate(lines):
            jump = re.match(r"j\w+ +([0-9a-f]+)", text)
            if jump and int(jump[1], 16) < address:
                start = next(i for i, (at, _) in enumerate(lines) if at >= int(jump[1], 16))
                inside = [text for _, text in lines[start:end]]
                if not any(re.match(r"j\w+ ", text) for text in inside):
                    loops.append(inside)
    return loops


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils")
@pytest.mark.skipif("x86_64" not in platform.machine(), reason="reads x86 instructions")
@pytest.mark.parametrize(
    ("function", "instruction", "least"),
    [
        ("::tile<6>", r"vpdpbusd %zmm", 24),
        ("::tile<6>", r"{vex} vpdpbusd %ymm", 12),
        ("::add_parts<1, true>", r"vpmaddubsw %ymm", 8),
        ("::add_parts<4, true>", r"vpmaddubsw %ymm", 8),
        ("::stream<1, true>", r"vpdpbusd %zmm", 4),
        ("::stream<4, true>", r"vpdpbusd %zmm", 16),
        ("::fp8_tile<3>", r"vdpbf16ps %zmm", 24),
        ("::fp8_tile<3>", r"vfmadd231ps %zmm", 24),
        ("::fp8_tile<3>", r"vfmadd231ps %ymm", 12),
    ],
)
def test_sums_stay_in_registers(function, instruction, least):
    done = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(native.find("quant_cpu"))],
        capture_output=True,
        text=True,
        check=True,
    )
    loops = inner_loops(done.stdout, re.escape(function))
    meant = [loop for loop in loops if len([t for t in loop if re.match(instruction, t)]) >= least]
    assert meant, f"no loop of {function} has {least} of {instruction}"
    for loop in meant:
        stores = [text for text in loop if re.search(r"vmov\S+ +%[xyz]mm\d+,.*\(", text)]
        stack = [text for text in loop if "(%rsp)" in text and "mm" in text]
        assert not stores, stores
        assert not stack, stack
