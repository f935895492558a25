"""What the compiler made of the kernels: registers, spills and instructions, without a GPU.

    python -m quant_kernels.triton.offline --markdown registers.md --arch 90 --arch 80

A number computed right can still be computed slowly: in registers that spill to local memory, by
FP16 tensor cores where FP8 ones were meant, or by wgmma instructions that wait for each other. None
of it shows in the interpreter. So every case that a kernel module lists in `compile_cases()` goes
through Triton and ptxas for sm_90a and sm_80, and its SASS is read: `problems` says what is wrong.

A case is (name, kernel, signature, constexprs, options, needs_fp8), and after them, where not all
of its integers are multiples of 16, the names of those that are; the option `unaligned` names the
others instead. Pointers are aligned, as torch's are. Cases that need FP8 tensor cores, and those
that stand in for them elsewhere, are compiled for their own architecture only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quant_kernels import dispatch

MODULES = ("activation", "gemm", "kv_append", "prefill_attention", "decode_attention")
ARCHITECTURES = (90, 80)
TENSOR_CORE = ("QGMMA", "IGMMA", "HGMMA", "IMMA", "HMMA", "QMMA")
OTHERS = ("PRMT", "LOP3", "IMAD", "I2F", "F2F", "F2FP", "LDGSTS", "UTMALDG")
LOCAL = ("LDL", "STL")
# What kernels are named that add up the parts of others.
WITHOUT_PRODUCTS = ("combine", "reduce")
# ptxas's note that it put a wait after every wgmma.
SERIALIZED = "instructions are serialized"

Case = tuple[Any, ...]


class OfflineError(RuntimeError):
    """Why nothing can be compiled here, or what a tool of the compiler answered."""


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture: target as in the PTX, bytes per thread or program, counts.

    stack: bytes of local memory that ptxas reserved, spills among them. shared: dynamic shared
    memory. local_accesses: LDL and STL in the SASS. mixed_rows: as the function of that name found.
    instructions: those of TENSOR_CORE and OTHERS that occur.
    """

    name: str
    target: str
    registers: int
    stack: int
    shared: int
    local_accesses: int
    serialized: bool
    mixed_rows: bool
    instructions: dict[str, int]


@dataclass(frozen=True)
class Report:
    """A case, what it became or why it did not compile, and what is wrong with it."""

    module: str
    name: str
    arch: int
    intended: str | None
    compiled: Compiled | None
    problems: list[str]


def cases(module: str) -> list[Case]:
    """What `quant_kernels.triton.<module>` lists for compilation."""
    found = importlib.import_module(f"quant_kernels.triton.{module}").compile_cases()
    return list(found)


def applies(module: str, case: Case, arch: int) -> bool:
    """Whether a case is meant for sm_<arch>."""
    name, needs_fp8 = case[0], case[5]
    if (arch // 10, arch % 10) < dispatch.FP8_CAPABILITY:
        return not needs_fp8
    # Elsewhere FP16 is a type of what goes in or out.
    multiplies = module in ("gemm", "prefill_attention")
    return not ("without FP8" in name or (multiplies and "fp16" in name))


def intended(module: str, case: Case, arch: int) -> str | None:
    """The tensor-core instruction that a kernel must come down to; None where it needs none."""
    hopper = arch >= 90
    if any(word in case[0] for word in WITHOUT_PRODUCTS):
        return None
    if module == "gemm" and "int8" in case[0]:
        return "IGMMA" if hopper else "IMMA"
    if module in ("gemm", "prefill_attention"):
        return "QGMMA" if hopper else "HMMA"
    # A decode step has one row of queries a KV head's group: FP16 tiles of 16 rows, no wgmma.
    return "HMMA" if module == "decode_attention" else None


def compile_kernel(case: Case, arch: int) -> Compiled:
    """Through Triton and ptxas for sm_<arch>, and the SASS through cuobjdump.

    Raises OfflineError in Triton's interpreter, where a kernel is a Python function.
    """
    name, kernel, signature, constexprs, options = case[:5]
    if dispatch.interpreted():
        raise OfflineError(
            "TRITON_INTERPRET=1 is set: the kernels are interpreted here and cannot be compiled; "
            "run this in a process without it"
        )
    position = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constexprs, "constexpr")},
        constexprs={(position(arg),): value for arg, value in constexprs.items()},
        attrs={(position(arg),): [["tt.divisibility", 16]] for arg in _aligned(case)},
    )
    options = {key: value for key, value in options.items() if key != "unaligned"}
    with _ptxas_log() as log:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = _disassemble(made.asm["cubin"])
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise OfflineError(f"cuobjdump -res-usage named no registers of {name}:\n{usage}")
    counts = _count(sass)
    return Compiled(
        name=name,
        target=re.findall(r"^\.target\s+(\w+)", made.asm["ptx"], flags=re.MULTILINE)[0],
        registers=int(resources[1]),
        stack=int(resources[2]),
        shared=made.metadata.shared,
        local_accesses=sum(counts.pop(opcode) for opcode in LOCAL),
        serialized=SERIALIZED in log.getvalue(),
        mixed_rows=mixed_rows(made.asm["ttgir"]),
        instructions={opcode: count for opcode, count in counts.items() if count},
    )


def mixed_rows(ttgir: str) -> bool:
    """Whether inline PTX with group scales gets bytes of several rows in one register.

    It takes the first of four scales for all four bytes (`convert.py`), so the layout that the
    compiler gave it must have four neighbouring columns of a row next to each other in a thread.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", ttgir, flags=re.MULTILINE))
    for line in ttgir.splitlines():
        found = re.search(
            r"inline_asm .*packed_element = 4 .*?\} (%.*?) : tensor<\w+, (.*?)>", line
        )
        if found is not None and found[1].count("%") > 1:
            layout = str(layouts.get(found[2], found[2]))
            blocked = re.search(r"sizePerThread = \[1, (\d+)\].*order = \[1, 0\]", layout)
            columns = blocked or re.search(r"opIdx = 0.*kWidth = (\d+)", layout)
            whole = columns is not None and int(columns[1]) >= 4
            if not whole and "register = [[0, 1], [0, 2]" not in layout:
                return True
    return False


def problems(compiled: Compiled, wanted: str | None, arch: int) -> list[str]:
    """What would make the kernel slow, one line each; none: as it should be."""
    found = []
    if compiled.stack:
        found.append(f"{compiled.stack} bytes of stack a thread")
    if compiled.local_accesses:
        found.append(f"{compiled.local_accesses} accesses to local memory")
    if compiled.serialized:
        found.append("wgmma instructions wait for each other")
    if compiled.mixed_rows:
        found.append("group scales of one row meet codes of another in inline PTX")
    if wanted is not None and wanted not in compiled.instructions:
        seen = [opcode for opcode in TENSOR_CORE if opcode in compiled.instructions]
        found.append(f"{wanted} was meant, and {', '.join(seen) or 'no tensor core'} is used")
    # Without the a, ptxas has no wgmma.
    target = "sm_90a" if arch == 90 else f"sm_{arch}"
    if compiled.target != target:
        found.append(f"compiled for {compiled.target}, not {target}")
    return found


def report(module: str, index: int, arch: int) -> Report:
    """Case `index` of a module on one architecture; an error becomes a problem."""
    name, wanted = f"case {index}", None
    try:
        case = cases(module)[index]
        name, wanted = case[0], intended(module, case, arch)
        made = compile_kernel(case, arch)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Report(module, name, arch, wanted, None, [f"{type(error).__name__}: {lines[-1]}"])
    return Report(module, name, arch, wanted, made, problems(made, wanted, arch))


def reports(architectures: Sequence[int], modules: Sequence[str], jobs: int) -> list[Report]:
    """Every case of every module on every architecture it is meant for."""
    tasks = [
        (module, index, arch)
        for module in modules
        for arch in architectures
        for index, case in enumerate(cases(module))
        if applies(module, case, arch)
    ]
    if jobs == 1:
        return [report(*task) for task in tasks]
    # ptxas and the disassembler are processes of their own, but Triton's passes hold the GIL.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(report, *zip(*tasks, strict=True)))


def markdown(found: Sequence[Report]) -> str:
    """The reports as a table."""
    lines = [
        f"Triton {triton.__version__}, `python -m quant_kernels.triton.offline`. Registers and "
        "stack of a thread, shared memory of a program, instructions as they stand in the SASS.",
        "",
        "| kernel | case | target | registers | stack | shared | tensor cores | others | wrong |",
        "|---|---|---|--:|--:|--:|---|---|---|",
    ]
    for row in found:
        made, wrong = row.compiled, "; ".join(row.problems) or "none"
        if made is None:
            figures = f"sm_{row.arch} | | | | | "
        else:
            cores, others = (
                ", ".join(f"{made.instructions[o]} {o}" for o in part if o in made.instructions)
                for part in (TENSOR_CORE, OTHERS)
            )
            figures = (
                f"{made.target} | {made.registers} | {made.stack} | {made.shared} | {cores} | "
                f"{others}"
            )
        lines.append(f"| {row.module} | {row.name} | {figures} | {wrong} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a kernel has a problem."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--module", action="append", choices=MODULES)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args(arguments)
    if dispatch.interpreted():
        print("offline: unset TRITON_INTERPRET first; interpreted kernels cannot be compiled")
        return 1
    found = reports(args.arch or ARCHITECTURES, args.module or MODULES, args.jobs)
    table = markdown(found)
    print(table)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"triton": triton.__version__, "kernels": [asdict(row) for row in found]}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    wrong = [row for row in found if row.problems]
    print(f"{len(found)} kernels compiled, {len(wrong)} with problems")
    return 1 if wrong else 0


def _aligned(case: Case) -> list[str]:
    """The arguments that are divisible by 16: pointers, and integers as the case says."""
    signature, options = case[2], case[4]
    integers = [arg for arg, kind in signature.items() if re.match(r"[iu]\d", kind)]
    if len(case) > 6:
        integers = [arg for arg in integers if arg in case[6]]
    integers = [arg for arg in integers if arg not in options.get("unaligned", ())]
    return [arg for arg, kind in signature.items() if kind.startswith("*")] + integers


@contextlib.contextmanager
def _ptxas_log() -> Iterator[io.StringIO]:
    """What ptxas prints about a kernel; Triton passes it on, if asked, to stdout."""
    log = io.StringIO()
    before = triton.knobs.nvidia.dump_ptxas_log
    triton.knobs.nvidia.dump_ptxas_log = True
    # A kernel from Triton's cache has no log, so none is taken from there.
    always = triton.knobs.compilation.always_compile
    triton.knobs.compilation.always_compile = True
    try:
        with contextlib.redirect_stdout(log):
            yield log
    finally:
        triton.knobs.nvidia.dump_ptxas_log = before
        triton.knobs.compilation.always_compile = always


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) of a cubin, by the cuobjdump that Triton carries."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # cuobjdump looks for nvdisasm on the PATH.
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory(prefix="offline-") as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        texts = []
        for option in ("-res-usage", "-sass"):
            command = [tools / "cuobjdump", option, path]
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=False
            )
            if done.returncode:
                raise OfflineError(f"cuobjdump {option} failed: {done.stderr.strip()}")
            texts.append(done.stdout)
    return texts[0], texts[1]


def _count(sass: str) -> dict[str, int]:
    """How often each opcode occurs; variants (LDL.64, IMAD.WIDE) count as theirs."""
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, re.MULTILINE)
    return {name: opcodes.count(name) for name in (*TENSOR_CORE, *OTHERS, *LOCAL)}


if __name__ == "__main__":
    sys.exit(main())
