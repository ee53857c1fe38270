import os

if 'PYTEST_XDIST_WORKER' in os.environ:  # before PyTorch starts: there are as many workers as cores, who spin for them
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest  # noqa: E402
from environment import Environment  # noqa: E402


@pytest.fixture
def bare(tmp_path):
    return Environment(tmp_path / 'env')


@pytest.fixture
def env(bare):
    bare.install()
    return bare
