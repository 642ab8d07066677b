"""What the CUDA compiler makes of kernels/csrc/cuda, on a machine with nvcc and without a GPU.

    python benchmarks/cuda_report.py [--arch 80 90] [--json FILE] [--objects DIR]

For each kernel: registers, spilled bytes and static shared memory (from `-Xptxas -v`), and, where a
disassembler is found (cuobjdump of the toolkit or of Triton's wheel), the instructions of its loops
per sample. "gather" is the loop in which a group of lanes fetches a sample's four tokens; "prepare"
and "finish" have a lane per sample. In the aggregated backward "sum" is the loop in which a group
adds up sorted contributions, four per sample, and "prepare" all that a thread does for its sample.
A warp's instruction serves 32 / G samples in "gather" and "sum" and 32 in the others, where G is the
lanes per (query, head): the table divides by that, so the numbers compare with kernels that give a
warp one head's sample at a time. They are static: a loop's whole body counts, taken or not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "kernels" / "csrc" / "cuda"
TYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
TYPE = "(" + "|".join(TYPES) + ")"


@dataclass
class Kernel:
    arch: int
    name: str  # e.g. "backward float32 x32 given"
    registers: int
    spilled_bytes: int
    shared_bytes: int
    gather: float | None = None  # instructions per sample
    prepare: float | None = None
    finish: float | None = None
    sum: float | None = None
    atomics: list[str] | None = None  # opcodes, e.g. REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    found = [home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((x for x in found if x and Path(x).is_file()), None)


def cuda_home() -> Path | None:
    """The toolkit that nvcc belongs to; nvcc itself may be a wrapper script elsewhere."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]


def find_disassembler() -> str | None:
    home = cuda_home()
    found = [shutil.which("cuobjdump"), home and str(home / "bin" / "cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        found.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((x for x in found if x and Path(x).is_file()), None)


def compile_source(source: Path, archs: list[int], folder: Path) -> tuple[Path, str]:
    """Object file and the compiler's report.

    Raises:
        subprocess.CalledProcessError: it does not compile (the message is on stderr).
    """
    target = folder / f"{source.stem}.o"
    command = [
        find_nvcc(),
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Xptxas",
        "-v",
        "-Xcompiler",
        "-fPIC",
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    return target, done.stderr


def short_name(symbol: str) -> str:
    """From a mangled kernel name: operator, dtype, channels, variant."""
    kernel = re.search(r"\d((?:[a-z]+_)+)kernelI", symbol)
    name = kernel[1].rstrip("_").replace("_", " ") if kernel else symbol
    words = [name]
    if width := re.search(rf"WidthI{TYPE}Li(\d+)ELi(\d+)ELb([01])E", symbol):
        exact = width[4] == "1"
        words += [TYPES[width[1]], f"x{int(width[2]) * int(width[3])}" if exact else "any"]
        if name.startswith("key aware"):
            shared = re.match(r"E*Lb([01])E", symbol[width.end() :])
            words.append("keys=values" if shared and shared[1] == "1" else "keys")
    elif plain := re.search(rf"kernelI{TYPE}{TYPE}?", symbol):
        words += [TYPES[x] for x in plain.groups() if x]
    if name == "reference":
        return " ".join(words)
    if "FusedI" in symbol:
        source = re.search(rf"FusedI[fd]({TYPE}|S\d*_)E", symbol)
        wide = source is None or source[1] in ("f", "d")
        words.append("fused" if wide else "fused, 16-bit offsets")
    elif "GivenI" in symbol and "key aware" not in name:
        words.append("given")
    if "FixedMap" in symbol:
        words.append("deterministic")
    return " ".join(words)


def parse_report(text: str) -> dict[tuple[int, str], Kernel]:
    kernels = {}
    for part in text.split("Compiling entry function '")[1:]:
        symbol, arch = re.match(r"(\S+)' for 'sm_(\d+)\w*'", part).groups()
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        kernels[int(arch), symbol] = Kernel(
            arch=int(arch),
            name=short_name(symbol),
            registers=int(re.search(r"Used (\d+) registers", part)[1]),
            spilled_bytes=int(spilled[1]) + int(spilled[2]) if spilled else 0,
            shared_bytes=int(shared[1]) if shared else 0,
        )
    return kernels


def loops(code: str) -> list[list[str]]:
    """Instructions of each loop of a disassembled function, shortest first."""
    listing = [(int(a, 16), i) for a, i in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]+);", code)]
    found = []
    for address, instruction in listing:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < address:
            start = int(jump[1], 16)
            found.append([i for a, i in listing if start <= a <= address])
    return sorted(found, key=len)


def count(body: list[str], opcode: str) -> int:
    return sum(bool(re.search(rf"(^|\s){opcode}\b", i)) for i in body)


def count_instructions(kernel: Kernel, symbol: str, code: str) -> None:
    width = re.search(rf"WidthI{TYPE}Li(\d+)ELi(\d+)ELb1E", symbol)
    if width is None:  # steps over the channels: no fixed number per sample
        return
    group = int(width[3])
    if kernel.name.startswith("aggregated"):
        count_aggregated(kernel, group, loops(code))
        return
    maps = 2 if kernel.name.endswith("keys") else 1
    for body in loops(code):
        gathers = count(body, "LDG")
        if kernel.gather is None and gathers >= 4 * maps and count(body, "LDS"):
            kernel.gather = len(body) / (gathers / (4 * maps)) / (32 / group)
        elif kernel.prepare is None and count(body, "STS") >= 2 and count(body, "LDG"):
            kernel.prepare = len(body) / 32
        elif kernel.finish is None and kernel.name.startswith("backward"):
            if count(body, "STG") and count(body, "LDS"):
                kernel.finish = len(body) / 32


def count_aggregated(kernel: Kernel, group: int, found: list[list[str]]) -> None:
    """Of backward_aggregated.cu, whose passes hold one sample per thread and have barriers."""
    gather = next(b for b in found if count(b, "LDG") == 4 and count(b, "SHFL"))
    walk = next(b for b in found if count(b, "RED(G|)") and count(b, "LDS"))
    one_pass = next(b for b in found if count(b, "BAR") >= 4)
    kernel.gather = len(gather) / (32 / group)
    kernel.sum = 4 * len(walk) / (32 / group)
    kernel.prepare = (len(one_pass) - len(gather) - len(walk)) / 32


def report(archs: list[int], folder: Path) -> list[Kernel]:
    """Compiles every .cu file into `folder`."""
    sources = sorted(SOURCES.glob("*.cu"))
    with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
        compiled = list(pool.map(lambda s: compile_source(s, archs, folder), sources))
    disassembler, found = find_disassembler(), []
    for target, text in compiled:
        kernels = parse_report(text)
        if disassembler:
            listing = subprocess.run(
                [disassembler, "-sass", str(target)], capture_output=True, text=True, check=True
            ).stdout
            for section in re.split(r"\n\s*arch = sm_", listing)[1:]:
                arch = int(re.match(r"\d+", section)[0])
                for function in re.split(r"\n\s*Function : ", section)[1:]:
                    symbol = function.split("\n", 1)[0].strip()
                    kernel = kernels[arch, symbol]
                    count_instructions(kernel, symbol, function)
                    kernel.atomics = sorted(set(re.findall(r"\b(?:RED|ATOM)[\w.]+", function)))
        found += kernels.values()
    return sorted(found, key=lambda k: (k.arch, k.name))


def print_table(kernels: list[Kernel]) -> None:
    print(f"{'':5} {'':58} {'bytes':>17} {'instructions per sample':>36}")
    print(
        f"{'arch':5} {'kernel':58} {'regs':>4} {'spill':>5} {'shared':>6}"
        f" {'gather':>8} {'sum':>8} {'prepare':>8} {'finish':>8}"
    )
    for k in kernels:
        counts = ("-" if x is None else f"{x:.1f}" for x in (k.gather, k.sum, k.prepare, k.finish))
        print(
            f"sm_{k.arch} {k.name:58} {k.registers:4} {k.spilled_bytes:5} {k.shared_bytes:6} "
            + " ".join(f"{x:>8}" for x in counts)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], metavar="CC")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--objects", type=Path, help="keep the object files in this folder")
    args = parser.parse_args()
    if find_nvcc() is None:
        sys.exit("no CUDA compiler: put nvcc on the PATH or set CUDA_HOME")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.objects or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            kernels = report(args.arch, folder)
        except subprocess.CalledProcessError:
            sys.exit("the CUDA sources do not compile, see above")
    print_table(kernels)
    if find_disassembler() is None:
        print("no instruction counts: cuobjdump is neither in the CUDA toolkit nor in Triton's wheel")
    if args.json:
        args.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1))


if __name__ == "__main__":
    main()
