#!/usr/bin/env python3
"""Write hub_configs/<model>.<tag>.json, the config.json that belongs to each registered model and tag on the Hub"""
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
from timm.models import get_arch_pretrained_cfgs
from tqdm import tqdm

from timm_cbam.hub import save_model

HUB_CONFIGS = Path(__file__).parents[1] / 'hub_configs'


def main() -> None:
    for file in HUB_CONFIGS.glob('*.json'):
        file.unlink()
    names = [tagged for name in timm.list_models('cbam*') for tagged in get_arch_pretrained_cfgs(name)]
    for name in tqdm(names):
        with TemporaryDirectory() as folder:
            save_model(timm.create_model(name), folder)
            shutil.copy(Path(folder, 'config.json'), HUB_CONFIGS / f'{name}.json')


if __name__ == '__main__':
    main()
