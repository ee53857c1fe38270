"""The command `timm-cbam`"""
import argparse
import sys
from typing import List, Optional

import torch
from timm.models import create_model, get_arch_pretrained_cfgs, list_models

from . import __version__

__all__ = ['main']


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


def _demo(args: argparse.Namespace) -> None:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as e:
        raise RuntimeError(f"the demo needs {e.name}: pip install 'timm-cbam[demo]'") from e
    from .demo import run_demo

    run_demo(args.output, epochs=args.epochs, seed=args.seed, device=args.device, model_name=args.model)


def _convert(args: argparse.Namespace) -> None:
    from .convert import convert

    convert(args.src, args.dst, model_name=args.model, to=args.to, verify=args.verify)


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-cbam', description='CBAM-ResNets for timm.')
    parser.add_argument('--version', action='version', version=f'timm-cbam {__version__}')
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
