"""What the compiler made of the CUDA kernels: their instructions, by cuobjdump."""

from __future__ import annotations

import collections
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

INTEGER = ("LOP3", "PRMT", "SHF", "IMAD", "IADD3", "LEA", "VIADD", "SEL", "ISETP", "VIMNMX")


@dataclass(frozen=True)
class Kernel:
    """A kernel's (address, instruction) pairs, and bytes of stack a thread."""

    name: str
    instructions: list[tuple[int, str]]
    stack: int

    def counts(self) -> collections.Counter[str]:
        """How often each opcode occurs, variants (LDS.128) as theirs."""
        return collections.Counter(_opcode(text) for _, text in self.instructions)

    def loop(self) -> collections.Counter[str]:
        """Opcodes of the main loop: the shortest stretch back to which a branch goes, with MMAs."""
        found: list[list[str]] = []
        for address, text in self.instructions:
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if target is not None and int(target[1], 16) < address:
                start = int(target[1], 16)
                body = [t for at, t in self.instructions if start <= at <= address]
                if any("GMMA" in t for t in body):
                    found.append(body)
        return collections.Counter(_opcode(text) for text in min(found, key=len))


def kernels(library: Path) -> dict[str, Kernel]:
    """Every kernel of a library by its mangled name; skips where there is no cuobjdump."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}

    def say(option: str) -> str:
        command = [str(tools / "cuobjdump"), option, str(library)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return done.stdout

    stacks = dict(re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", say("-res-usage")))
    found = {}
    for part in say("-sass").split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        pairs = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", part)
        instructions = [(int(address, 16), text) for address, text in pairs]
        found[name] = Kernel(name, instructions, int(stacks[name]))
    return found


def integers(counts: collections.Counter[str]) -> int:
    """Integer instructions among them."""
    return sum(counts[opcode] for opcode in INTEGER)


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]
