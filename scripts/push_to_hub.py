#!/usr/bin/env python3
"""Publish a converted or trained model folder on the Hugging Face Hub, with a complete model card

The folder is one that `timm-cbam convert`, `timm-cbam demo` or `timm.models.save_for_hf` wrote; it is loaded first, so
that nothing is published that timm could not load. Files and card are one commit, the folder stays as it is. Log in
with `hf auth login` or HF_TOKEN.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Tuple

from huggingface_hub import CommitOperationAdd, HfApi
from timm import create_model

from timm_cbam.hub import model_card, read_config


def _metric(value: str) -> Tuple[str, float]:
    name, _, number = value.partition('=')
    return name, float(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder with config.json and model.safetensors')
    parser.add_argument('repo', help='repository, me/my-cbam; created if there is none')
    parser.add_argument('--license', required=True, help='license of the weights as the Hub abbreviates it: mit, ...')
    parser.add_argument('--description', help="where the weights come from, None for the config's description")
    parser.add_argument('--dataset', help='data set that the metrics were measured on')
    parser.add_argument(
        '--metric', type=_metric, action='append', default=[], metavar='NAME=VALUE',
        help='what you measured, accuracies in percent, for example accuracy=98.9; more than once')
    args = parser.parse_args()
    if args.metric and not args.dataset:
        parser.error('--metric needs --dataset, on which it was measured')
    missing = [name for name in ('config.json', 'model.safetensors') if not (args.folder / name).is_file()]
    if missing:
        sys.exit(f'{args.folder} has no {" and no ".join(missing)}; make it with timm-cbam convert.')
    create_model(f'local-dir:{args.folder}', pretrained=True)

    config = read_config(args.folder)
    card = model_card(
        config,
        name=args.repo.split('/')[-1],
        source=f'hf-hub:{args.repo}',
        description=args.description or config['pretrained_cfg'].get('description', ''),
        license=args.license,
        dataset=args.dataset,
        metrics=dict(args.metric),
    )
    api = HfApi()
    repo = api.create_repo(args.repo, exist_ok=True).repo_id
    files = {'README.md': card.encode(), 'config.json': json.dumps(config, indent=2).encode()}
    files.update({n: args.folder / n for n in ('model.safetensors', 'demo.png') if (args.folder / n).is_file()})
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    print(api.create_commit(repo, operations, commit_message=f"Add {config['architecture']}").commit_url)
    print(f"timm.create_model('hf-hub:{repo}', pretrained=True)")


if __name__ == '__main__':
    main()
