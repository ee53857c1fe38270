import pytest
from environment import Environment


@pytest.fixture
def bare(tmp_path):
    return Environment(tmp_path / 'env')


@pytest.fixture
def env(bare):
    bare.install()
    return bare
