"""The command `timm-cbam`"""
import argparse
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Iterator, List, Optional, Sequence
from urllib.error import URLError

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import PretrainedCfg, create_model, get_arch_pretrained_cfgs, is_model, list_models

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


def _is_download_error(error: Optional[BaseException]) -> bool:
    """Whether an error, or one that it is due to, is of the network."""
    while error is not None:
        # without a connection huggingface_hub says that a file is not in its cache
        if isinstance(error, (URLError, LocalEntryNotFoundError, ConnectionError, TimeoutError)):
            return True
        if type(error).__module__.partition('.')[0] in ('httpx', 'httpx2', 'requests'):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _loading(*names: str) -> Iterator[None]:
    """Say what to do where timm cannot load a model."""
    for name in names:
        if ':' not in name and not is_model(name) and Path(name).is_dir():
            raise ValueError(f'Unknown model ({name}), for the folder of this name use local-dir:{name}')
    try:
        yield
    except Exception as e:
        if not _is_download_error(e):
            raise
        raise OSError(
            f'{str(e).rstrip(".")}. The weights had to be downloaded. Where that is not possible, name a folder with '
            f'config.json and model.safetensors: local-dir:FOLDER') from e


def _weights(name: str) -> List[PretrainedCfg]:
    """Weights that `pretrained=True` can load, the default first."""
    return [cfg for cfg in get_arch_pretrained_cfgs(name).values() if cfg.has_weights]


def _size(input_size: Sequence[int]) -> str:
    return 'x'.join(map(str, input_size))


def _list_models() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    print(f'{"model":<22} {"parameters":>11} {"GMACs":>7} {"input":>11}  weights')
    for name in list_models('cbam*'):
        model = create_model(name, device='meta').eval()
        input_size = model.pretrained_cfg['input_size']
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *input_size, device='meta'))
        parameters = sum(p.numel() for p in model.parameters())
        weights = _weights(name)
        tags = weights[0].tag if weights else 'none'
        if len(weights) > 1:
            tags += f' and {len(weights) - 1} more'
        print(
            f'{name:<22} {parameters:>11,} {counter.get_total_flops() / 2e9:>7.2f} {_size(input_size):>11}  {tags}')


def _list_weights(name: str) -> None:
    weights = _weights(name)
    if not weights:
        print(f'{name} has no pretrained weights.')
        return
    rows = [(f'{name}.{cfg.tag}', _size(cfg.input_size), cfg.num_classes, cfg.license or 'unknown') for cfg in weights]
    width = max(len(row[0]) for row in rows)
    print(f'{"weights, default first":<{width}} {"input":>11} {"classes":>8}  license')
    for tagged, size, classes, license in rows:
        print(f'{tagged:<{width}} {size:>11} {classes:>8,}  {license}')
    if any(cfg.tag.startswith('warm_') for cfg in weights):
        print("warm_...: timm's weights of the plain ResNet; the attention is not trained yet and changes nothing")


def _list(args: argparse.Namespace) -> None:
    if args.name:
        _list_weights(args.name)
    else:
        _list_models()


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

    convert(
        args.src, args.dst, model_name=args.model, to=args.to, verify=args.verify, prefix=args.prefix,
        spatial_order=args.spatial_order)


def _explain(args: argparse.Namespace) -> None:
    _require('explain', 'explain', 'matplotlib', 'pytorch_grad_cam')
    from .explain import explain

    with _loading(args.model, *args.compare):
        explain(
            args.images, args.model, args.compare, args.target, args.output, gates=not args.no_gates, grid=args.grid)


def _report(args: argparse.Namespace) -> None:
    _require('report', 'explain', 'matplotlib')
    from .explain import report

    print(report(args.run_dir))


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-cbam', description='CBAM-ResNets for timm.')
    parser.add_argument(
        '--version', action=_Version, nargs=0, help='show the version and which implementation runs on CPU, and exit')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND')

    command = commands.add_parser(
        'list', help='list the models, or the pretrained weights of one',
        description='List all models with their size and default weights, or all pretrained weights of one model.')
    command.add_argument('name', metavar='MODEL', nargs='?', type=_model_name, help='list the weights of this model')
    command.set_defaults(run=_list)

    command = commands.add_parser(
        'demo', help='train a small model on handwritten digits, save it, load it again and draw where it looks',
        description='Train a model on handwritten digits, without any download. The output folder gets the model, in '
        'the format of the Hugging Face Hub, and a picture of where it looks.')
    command.add_argument(
        '--epochs', type=_positive_int, default=5, help='number of training epochs (default: %(default)s)')
    command.add_argument(
        '--output', default='timm-cbam-demo', help='output folder, replaced if it exists (default: %(default)s)')
    command.add_argument('--seed', type=int, default=42, help='random seed (default: %(default)s)')
    command.add_argument(
        '--device', type=_device, help='device to train on, such as cpu or cuda (default: the best one available)')
    command.add_argument(
        '--model', type=_model_name, default='cbam_resnet18_s1', help='model to train (default: %(default)s)')
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        'convert', help='convert a checkpoint of other CBAM code or of a plain ResNet for timm, or back',
        description='Convert a checkpoint to a folder, for timm.create_model("local-dir:DST", pretrained=True) and the '
        'Hugging Face Hub. Which code it is of, depth and arguments of the network are found out from the weights. '
        'With --to, convert it to a checkpoint for other CBAM code instead.')
    command.add_argument(
        'src', metavar='SRC', help='checkpoint, or a folder with one (of the Hub, HF Trainer, accelerate)')
    command.add_argument('dst', metavar='DST', help='output folder (replaced if it exists), with --to a new file')
    command.add_argument('--model', type=_model_name, help='model that SRC is for (default: found out from SRC)')
    command.add_argument(
        '--to', choices=('article', 'channelattention', 'community', 'community_fc1', 'official', 'pytorchcv'),
        help='write a checkpoint for this code: of the reproduction article, with cbam_block.channelattention, '
        'luuuyi/CBAM.PyTorch (community) or its copies with ca.fc1, Jongchan/attention-module (official, by the '
        'authors of CBAM) or pytorchcv')
    command.add_argument(
        '--prefix', help='which weights to take from a checkpoint of several networks: keys of containers and what '
        'names begin with, joined by dots, as in teacher.backbone.')
    command.add_argument(
        '--spatial-order', choices=('avg-max', 'max-avg'),
        help='what the spatial attention of SRC concatenates (default: as the code does that has such names)')
    command.add_argument(
        '--verify', action='store_true',
        help='check that original and converted weights give the same output')
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
        '--compare', metavar='MODEL', nargs='+', default=[],
        help='more models for Grad-CAM, any CNNs of timm')
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

    command = commands.add_parser(
        'report', help="plot loss, accuracy and learning rate of a run of timm's train.py",
        description="Plot loss, accuracy and learning rate of a run of timm's train.py.")
    command.add_argument(
        'run_dir', metavar='RUN_DIR', help='output folder of the run, which has summary.csv and gets summary.png')
    command.set_defaults(run=_report)
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    parser = _create_parser()
    args = parser.parse_args(argv)
    if 'run' not in args:
        parser.print_help()
        return 0
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
