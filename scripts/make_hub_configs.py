#!/usr/bin/env python3
"""Write hub_configs/<model>.json, the config.json that belongs to each registered model on the Hub"""
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import timm

from timm_cbam.hub import save_model

HUB_CONFIGS = Path(__file__).parents[1] / 'hub_configs'


def main():
    for file in HUB_CONFIGS.glob('*.json'):
        file.unlink()
    for name in timm.list_models('cbam*'):
        with TemporaryDirectory() as folder:
            save_model(timm.create_model(name), folder)
            shutil.copy(Path(folder, 'config.json'), HUB_CONFIGS / f'{name}.json')
        print(name)


if __name__ == '__main__':
    main()
