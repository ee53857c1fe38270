"""The command `timm-cbam`"""
import argparse
import sys
from importlib import import_module
from typing import List, Optional

import torch
from timm.models import create_model, get_arch_pretrained_cfgs, list_models

from . import __version__, fusion
from .ops import native

__all__ = ['main']


class _Version(argparse.Action):
    """As argparse's own, with what runs on CPU."""

    def __call__(self, parser, *args):
        library, which = native.load()
        if not fusion.FUSED:
            implementation = 'module by module (TIMM_CBAM_FUSED=0)'
        elif library:
            implementation = f'native loops ({which})'
        else:
            implementation = f'PyTorch operations ({which})'
        print(f'timm-cbam {__version__}\nCPU: {implementation}')
        parser.exit()


def _positive_int(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{value} is less than 1')
    return number


def _device(value: str) -> str:
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as e:  # AssertionError: built without CUDA
        reason = str(e).splitlines()[0]
        raise argparse.ArgumentTypeError(f'{value!r} is no device of this machine, try cpu ({reason})') from e
    return value


def _model_name(value: str) -> str:
    names = list_models('cbam*')
    if value not in names:
        raise argparse.ArgumentTypeError(f'{value!r} is none of {", ".join(names)}')
    return value


def _list(args: argparse.Namespace) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    print(f'{"model":<22} {"parameters":>11} {"GMACs":>7} {"input":>11}  tags')
    for name in list_models('cbam*'):
        model = create_model(name, device='meta').eval()
        input_size = model.pretrained_cfg['input_size']
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *input_size, device='meta'))
        parameters = sum(p.numel() for p in model.parameters())
        tags = ' '.join(cfg.tag for cfg in get_arch_pretrained_cfgs(name).values())
        print(
            f'{name:<22} {parameters:>11,} {counter.get_total_flops() / 2e9:>7.2f} '
            f'{"x".join(map(str, input_size)):>11}  {tags}')


def _require(command: str, extra: str, *packages: str) -> None:
    try:
        for package in packages:
            import_module(package)
    except ImportError as e:
        raise RuntimeError(f"{command} needs {e.name or package}: pip install 'timm-cbam[{extra}]' ({e})") from e


def _demo(args: argparse.Namespace) -> None:
    _require('the demo', 'demo', 'matplotlib', 'sklearn')
    from .demo import run_demo

    run_demo(args.output, epochs=args.epochs, seed=args.seed, device=args.device, model_name=args.model)


def _convert(args: argparse.Namespace) -> None:
    from .convert import convert

    convert(args.src, args.dst, model_name=args.model, to=args.to, verify=args.verify)


def _explain(args: argparse.Namespace) -> None:
    _require('explain', 'explain', 'matplotlib', 'pytorch_grad_cam')
    from .explain import explain

    explain(
        args.images, args.model, args.compare, args.target, args.output, gates=not args.no_gates, grid=args.grid)


def _report(args: argparse.Namespace) -> None:
    _require('report', 'explain', 'matplotlib')
    from .explain import report

    print(report(args.run_dir))


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-cbam', description='CBAM-ResNets for timm.')
    parser.add_argument('--version', action=_Version, nargs=0, help='show the version, and what runs on CPU, and exit')
    commands = parser.add_subparsers(dest='command', required=True)

    command = commands.add_parser('list', help='models, parameters, multiply-adds, weight tags')
    command.set_defaults(run=_list)

    command = commands.add_parser(
        'demo', help='train, save, reload and picture a model on handwritten digits',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument('--epochs', type=_positive_int, default=5, help='number of epochs')
    command.add_argument('--output', default='timm-cbam-demo', help='folder to write, a former one is replaced')
    command.add_argument('--seed', type=int, default=42, help='seed of everything random')
    command.add_argument('--device', type=_device, help='device to train on, None for the best there is')
    command.add_argument('--model', type=_model_name, default='cbam_resnet18_s1', help='model to train')
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        'convert', help='make a checkpoint of other CBAM code, or of a plain ResNet, loadable with timm; or back',
        description='Recognise layout, depth, stem, arguments and number of classes of a checkpoint, and write it as a '
        'folder in the format of the Hugging Face Hub, which timm loads as local-dir:DST. With --to, write a '
        'checkpoint for other CBAM code.')
    command.add_argument('src', metavar='SRC', help='checkpoint: .pth, .pth.tar, .bin or .safetensors')
    command.add_argument('dst', metavar='DST', help='folder to write, a former one is replaced; with --to a new file')
    command.add_argument('--model', type=_model_name, help='model that SRC is meant for, None to recognise it')
    command.add_argument(
        '--to', choices=('article', 'community', 'official', 'pytorchcv'),
        help='write a checkpoint for the code of the reproduction article, luuuyi/CBAM.PyTorch, '
        'Jongchan/attention-module (the authors) or pytorchcv')
    command.add_argument(
        '--verify', action='store_true',
        help='compute a noise image with the checkpoint, by the rules of its own code, and with what was written')
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        'explain', help='picture where models look: Grad-CAM, and the gates of one with CBAM',
        description='For each image a figure: what MODEL sees of it; Grad-CAM of each model at its last stage, with '
        'the class and its probability; where MODEL has CBAM, its spatial gates over the image and histograms of its '
        'channel gates. Models are named as for timm.create_model (NAME, hf-hub:USER/NAME, local-dir:FOLDER), and get '
        'their pretrained weights where there are any.')
    command.add_argument('images', metavar='IMAGE', nargs='+', help='images to explain')
    command.add_argument(
        '--model', default='cbam_resnet50_eccv18', help='model to explain (default: %(default)s)')
    command.add_argument(
        '--compare', metavar='MODEL', nargs='+', default=[], help='more models for Grad-CAM, any CNNs of timm')
    command.add_argument(
        '--target', metavar='CLASS',
        help="class that Grad-CAM looks for, by name or index (default: each model's most probable one)")
    command.add_argument(
        '--grid', action='store_true',
        help='one figure of Grad-CAM of all images by all models, those of --compare first; without gates')
    command.add_argument('--no-gates', action='store_true', help='leave out the gates of MODEL')
    command.add_argument(
        '-o', '--output', default='timm-cbam-explain',
        help='folder for the figures, each named after its image; for one figure also a file name that ends in .png, '
        '.jpg, .webp, .tif, .pdf or .svg (default: %(default)s)')
    command.set_defaults(run=_explain)

    command = commands.add_parser('report', help="draw the curves of a run of timm's train.py")
    command.add_argument('run_dir', metavar='RUN_DIR', help='folder with summary.csv, gets summary.png')
    command.set_defaults(run=_report)
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    args = _create_parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print('timm-cbam: interrupted', file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as e:
        print(f'timm-cbam: error: {e}', file=sys.stderr)
        return 1
    return 0

if __name__ == '__main__':
    sys.exit(main())
