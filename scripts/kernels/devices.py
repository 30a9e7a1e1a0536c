"""Where a check runs its kernels: a GPU through PyTorch's memory and the CUDA driver, or the CPU through the emulator."""
import ctypes
import os
import subprocess
import tempfile

import numpy as np

from compile import INCLUDES, ROOT, compile_source, kernels

HERE = os.path.dirname(os.path.abspath(__file__))


class Emulator:
    """Kernels of one compilation as C++ on the CPU. Blocks and warps run first to last, last to first and at random, in turn, so
    that what depends on their order differs from one launch to the next."""

    kind = "emulator"

    def __init__(self, define, source="ttt_linear.cpp"):
        self.launches = 0
        self.folder = tempfile.TemporaryDirectory()
        path = os.path.join(self.folder.name, "kernels.so")
        flags = ["g++", "-O2", "-std=c++17", "-w", "-shared", "-fPIC", "-ffp-contract=off", f"-D{define}"]
        flags += [f"-I{os.path.join(HERE, 'emulate')}", *(f"-I{folder}" for folder in INCLUDES[1:]), f"-I{os.path.join(ROOT, 'ops')}"]
        subprocess.run([*flags, os.path.join(HERE, "emulate", source), "-o", path], check=True)
        self.library = ctypes.CDLL(path)

    def upload(self, array):
        # 16 spare bytes keep every base aligned.
        raw = np.empty(array.nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        out = raw[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
        out[...] = array
        return out

    def address(self, buffer):
        return buffer.ctypes.data

    def download(self, buffer):
        return buffer.copy()

    def launch(self, name, params, blocks, threads, shared):
        self.library[f"emu_{name}"](ctypes.byref(params), blocks, threads, shared, self.launches % 3)
        self.launches += 1


class Gpu:
    """Kernels compiled for the GPU that is there."""

    kind = "gpu"

    def __init__(self, sources, defines=()):
        import torch

        self.torch = torch
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self.driver = ctypes.CDLL("libcuda.so.1")
        major, minor = torch.cuda.get_device_capability()
        arch = f"sm_{major}{minor}" + ("a" if major == 9 else "")
        self.functions, self.registers = {}, {}
        for source in sources:
            path = os.path.join(ROOT, "ops", *([] if "/" in source else ["ttt_linear"]), source)
            cubin, _ = compile_source(path, arch, defines)
            module = ctypes.c_void_p()
            self._ok(self.driver.cuModuleLoadData(ctypes.byref(module), cubin))
            for name in kernels(path):
                function, registers = ctypes.c_void_p(), ctypes.c_int()
                self._ok(self.driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
                self._ok(self.driver.cuFuncGetAttribute(ctypes.byref(registers), 4, function))
                self.functions[name], self.registers[name] = function, registers.value

    def _ok(self, status):
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"CUDA error {status}: {text.value}")

    def upload(self, array):
        view = array.view(np.int16) if array.dtype == np.uint16 else array.view(np.int32) if array.dtype == np.uint32 else array
        return self.torch.from_numpy(np.ascontiguousarray(view)).cuda()

    def address(self, buffer):
        return buffer.data_ptr()

    def download(self, buffer):
        array = buffer.cpu().numpy()
        return array.view(np.uint16) if array.dtype == np.int16 else array

    def launch(self, name, params, blocks, threads, shared):
        function = self.functions[name]
        if shared > 48 << 10:
            self._ok(self.driver.cuFuncSetAttribute(function, 8, shared))
        argument = ctypes.c_void_p(ctypes.addressof(params))
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        self._ok(self.driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.byref(argument), None))

    def graph(self, call, times):
        """`call` so many times as one CUDA graph: without the host's time for a launch."""
        call()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay

    def milliseconds(self, call, repeats=30):
        """Median time of `call`, after two calls to warm up."""
        torch = self.torch
        call(), call()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]
