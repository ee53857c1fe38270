#!/usr/bin/env python3
"""What exporters make of a CBAM-ResNet: a table of the errors against eager PyTorch, beside a plain ResNet's

Each row is an exporter with its opset or format. The error is ``|exported - eager| / |eager|`` (2-norms) of the logits
of eight noise images, where eager is in float32. All weights are random, those that start at zero too, which would hide
what comes before them. Exporters that are not installed are left out, and named.
"""
import argparse
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Dict, Tuple

import numpy as np
import torch
from timm import create_model
from timm.utils import random_seed
from torch import nn

import timm_cbam  # noqa: F401  registers the models where the autoload is off

Run = Callable[[torch.Tensor], torch.Tensor]


def _script(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
    return torch.jit.script(model)


def _trace(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
    return torch.jit.trace(model, x)


def _trace_bfloat16(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
    traced = torch.jit.trace(model.bfloat16(), x.bfloat16())
    return lambda x: traced(x.bfloat16())


def _export(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
    return torch.export.export(model, (x,)).module()


def _aot_inductor(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
    file = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=str(folder / 'model.pt2'))
    return torch._inductor.aoti_load_package(file)


def _pt2e(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x)
    return move_exported_model_to_eval(convert_pt2e(prepared))


def onnx(
        opset: int, dynamo: bool = False, int8: bool = False, threads: int = 0,
) -> Callable[[nn.Module, torch.Tensor, Path], Run]:
    def export(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
        import onnxruntime

        file = str(folder / 'model.onnx')
        torch.onnx.export(
            model, (x,), file, input_names=['x'], opset_version=opset, dynamo=dynamo, verbose=False)
        if int8:
            from onnxruntime import quantization

            class Reader(quantization.CalibrationDataReader):
                inputs = iter([{'x': x.numpy()}])

                def get_next(self):
                    return next(self.inputs, None)

            file, source = str(folder / 'int8.onnx'), file
            quantization.quantize_static(source, file, Reader(), per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options)
        return lambda x: torch.from_numpy(session.run(None, {'x': x.numpy()})[0])

    return export


def openvino(
        scripted: bool = False, int8: bool = False, threads: int = 0,
) -> Callable[[nn.Module, torch.Tensor, Path], Run]:
    def export(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
        import openvino as ov

        graph = ov.convert_model(torch.jit.script(model) if scripted else model, example_input=x)
        if int8:
            import nncf

            graph = nncf.quantize(graph, nncf.Dataset([x.numpy()]))
        graph.reshape(list(x.shape))
        compiled = ov.compile_model(
            graph, 'CPU', {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32'})
        return lambda x: torch.from_numpy(compiled(x.numpy())[0])

    return export


def _executorch(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
    file = folder / 'model.pte'
    file.write_bytes(program.to_executorch().buffer)
    loaded = Runtime.get().load_program(file)  # of which methods hold no reference
    return lambda x: loaded.load_method('forward').execute([x])[0]


def _litert(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
    import litert_torch

    edge = litert_torch.convert(model, (x,))
    return lambda x: torch.from_numpy(edge(x))


def _ncnn(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
    import ncnn
    import pnnx

    file = folder / 'model.pt'
    pnnx.export(model, str(file), (x[:1],), fp16=False)
    net = ncnn.Net()
    net.load_param(str(file.with_suffix('.ncnn.param')))
    net.load_model(str(file.with_suffix('.ncnn.bin')))

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = []
        for image in x:
            extractor = net.create_extractor()
            extractor.input('in0', ncnn.Mat(image.numpy()).clone())
            rows.append(torch.from_numpy(np.array(extractor.extract('out0')[1])))
        return torch.stack(rows)

    return run


def _coreml(model: nn.Module, x: torch.Tensor, folder: Path) -> Run:
    import coremltools

    program = coremltools.convert(
        torch.jit.trace(model, x), inputs=[coremltools.TensorType('x', x.shape)],
        compute_precision=coremltools.precision.FLOAT32)
    if sys.platform != 'darwin':
        raise NotImplementedError('converted; runs on macOS only')
    return lambda x: torch.from_numpy(next(iter(program.predict({'x': x.numpy()}).values())))


# Exporter, opset or format, dtype, and what does it
_EXPORTERS: Dict[Tuple[str, str, str], Callable[[nn.Module, torch.Tensor, Path], Run]] = {
    ('torch.jit.script', 'TorchScript', 'float32'): _script,
    ('torch.jit.trace', 'TorchScript', 'float32'): _trace,
    ('torch.jit.trace', 'TorchScript', 'bfloat16'): _trace_bfloat16,
    ('torch.export', 'ATen', 'float32'): _export,
    ('AOTInductor', '.pt2', 'float32'): _aot_inductor,
    ('PT2E, X86InductorQuantizer', 'ATen', 'int8'): _pt2e,
    ('torch.onnx, ONNX Runtime', 'opset 11', 'float32'): onnx(11),
    ('torch.onnx, ONNX Runtime', 'opset 13', 'float32'): onnx(13),
    ('torch.onnx, ONNX Runtime', 'opset 17', 'float32'): onnx(17),
    ('torch.onnx, ONNX Runtime', 'opset 17', 'int8'): onnx(17, int8=True),
    ('torch.onnx dynamo, ONNX Runtime', 'opset 18', 'float32'): onnx(18, dynamo=True),
    ('torch.onnx dynamo, ONNX Runtime', 'opset 21', 'float32'): onnx(21, dynamo=True),
    ('OpenVINO', 'IR, traced', 'float32'): openvino(),
    ('OpenVINO', 'IR, scripted', 'float32'): openvino(scripted=True),
    ('OpenVINO, NNCF', 'IR', 'int8'): openvino(int8=True),
    ('ExecuTorch, XNNPACK', '.pte', 'float32'): _executorch,
    ('LiteRT', '.tflite', 'float32'): _litert,
    ('Core ML', 'ML program', 'float32'): _coreml,
    ('ncnn, pnnx', '.param', 'float32'): _ncnn,
}


def _create(name: str) -> nn.Module:
    random_seed(0)
    model = create_model(name, num_classes=10).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1)
            nn.init.uniform_(norm.bias, -0.1, 0.1)
    return model


def error(name: str, exporter: Tuple[str, str, str], size: int) -> str:
    """The error of an exported model, or why there is none."""
    model = _create(name)
    x = torch.randn(8, 3, size, size)
    with torch.no_grad():
        eager = model(x)
        with TemporaryDirectory() as folder:
            try:
                logits = _EXPORTERS[exporter](model, x, Path(folder))(x)
            except NotImplementedError as e:
                return str(e)
            return f'{(logits.float() - eager).norm() / eager.norm():.0e}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet18', 'cbam_resnet18', 'cbam_resnet18_eccv18'])
    parser.add_argument('--img-size', type=int, default=64)
    parser.add_argument('--only', default='', help='exporters whose name has this')
    parser.add_argument('--row', type=int, help=argparse.SUPPRESS)  # one row in a process of its own
    args = parser.parse_args()
    if args.row is not None:
        exporter = list(_EXPORTERS)[args.row]
        cells = [error(name, exporter, args.img_size) for name in args.models]
        print('\n| ' + ' | '.join((*exporter, *cells)) + ' |')
        return
    print('| exporter | opset, format | dtype | ' + ' | '.join(args.models) + ' |')
    print('|---' * (3 + len(args.models)) + '|')
    missing = []
    for row, exporter in enumerate(_EXPORTERS):
        if args.only not in exporter[0]:
            continue
        command = [
            sys.executable, __file__, '--row', str(row), '--img-size', str(args.img_size), '--models', *args.models]
        result = subprocess.run(command, capture_output=True, text=True, errors='replace')
        errors = [line for line in result.stderr.splitlines() if re.match(r'[\w.]+(Error|Exception)\b', line)]
        reason = errors[-1] if errors else f'exit status {result.returncode}'
        if result.returncode and reason.startswith('ModuleNotFoundError'):
            missing.append(f'{exporter[0]} ({reason})')
        elif result.returncode:  # some take the whole process with them
            print('| ' + ' | '.join(exporter) + f' | failed: {reason} |')
        else:
            print(result.stdout.strip().rpartition('\n')[2])
    if missing:
        print('\nNot installed: ' + '; '.join(missing))


if __name__ == '__main__':
    main()
