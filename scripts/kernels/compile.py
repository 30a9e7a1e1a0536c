"""Compiles a kernel source with NVRTC, as the program does, and reports registers, stack and spills of each entry point.

    pip install nvidia-cuda-nvrtc==13.0.*
    python scripts/kernels/compile.py ttt_linear/forward.cu -D HEAD_DIM=64 [--arch sm_90a] [--out forward.cubin]

Needs no GPU. Exit status 1 when a kernel spills or has a stack frame.
"""
import argparse
import ctypes
import glob
import os
import re
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "crates", "ttt", "src")
INCLUDES = [os.path.join(ROOT, *folder) for folder in (("device", "cuda"), ("ops", "ttt_linear"), ("ops", "ttt_mlp"), ("ops", "step"),
                                                    ("ops", "attention"), ("ops", "selective_scan"), ("ops", "linear_attention"), ("ops",))]


def library():
    names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    for folder in sys.path:
        names += sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib", "libnvrtc.so.*")), key=len)
    for name in names:
        if "builtins" in name:
            continue
        try:
            for builtins in glob.glob(os.path.join(os.path.dirname(name) or ".", "libnvrtc-builtins.so*")):
                ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(name)
        except OSError:
            pass
    sys.exit("libnvrtc is not installed: pip install 'nvidia-cuda-nvrtc==13.0.*'")


def compile_source(path, arch, defines=(), max_registers=None):
    """-> (cubin bytes, log). Headers are given by name, as the program embeds them."""
    nvrtc = library()
    headers = {}
    for folder in INCLUDES:
        for header in glob.glob(os.path.join(folder, "*.cuh")):
            headers[os.path.basename(header)] = open(header, "rb").read()
    names, texts = list(headers), list(headers.values())
    count = len(names)
    program = ctypes.c_void_p()
    array = ctypes.c_char_p * count
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), open(path, "rb").read(), os.path.basename(path).encode(), count,
                                      array(*texts), array(*[n.encode() for n in names]))
    assert status == 0, status
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", "-lineinfo"] + [f"-D{d}" for d in defines]
    if max_registers:
        options.append(f"--maxrregcount={max_registers}")
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options]))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    log = log.value.decode()
    if status != 0:
        sys.exit(f"{path}: {log}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, log


def kernels(path):
    """Entry points of a source."""
    text = open(path).read()
    return re.findall(r"^KERNEL.*?\b(\w+)\(const __grid_constant__", text, re.M) + re.findall(r"^PRODUCT\((\w+), \d", text, re.M)


def report(log):
    """-> {kernel: (registers, stack bytes, spill store bytes, spill load bytes)}"""
    found, kernel = {}, None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack = [int(x) for x in match.groups()]
        elif kernel and (match := re.search(r"Used (\d+) registers", line)):
            found[kernel] = (int(match[1]), *stack)
            kernel = None
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="path, or path below crates/ttt/src/ops")
    parser.add_argument("-D", dest="defines", action="append", default=[])
    parser.add_argument("--arch", action="append", help="default: sm_80, sm_89, sm_90a")
    parser.add_argument("--max-registers", type=int)
    parser.add_argument("--out", help="writes the cubin of the last architecture")
    args = parser.parse_args()
    path = args.source if os.path.exists(args.source) else os.path.join(ROOT, "ops", args.source)
    bad = False
    for arch in args.arch or ["sm_80", "sm_89", "sm_90a"]:
        cubin, log = compile_source(path, arch, args.defines, args.max_registers)
        for line in log.splitlines():
            if "ptxas info" not in line and "bytes stack" not in line and line.strip():
                print(line)
        for kernel, (registers, stack, stores, loads) in report(log).items():
            print(f"{arch:7} {kernel:36} {registers:3} registers, stack {stack}, spills {stores} + {loads} bytes")
            bad |= stack + stores + loads > 0
    if args.out:
        open(args.out, "wb").write(cubin)
    sys.exit(bad)


if __name__ == "__main__":
    main()
