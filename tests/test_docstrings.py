"""Every public name has an example, and the examples run"""
import doctest

import pytest
import timm
import torch

import timm_cbam

WITHOUT = {'AttentionMaps'}  # what attention_maps returns, whose example shows it


@pytest.mark.parametrize('name', sorted(set(timm_cbam.__all__) - WITHOUT))
def test_example(name):
    public = {n: getattr(timm_cbam, n) for n in timm_cbam.__all__}
    example, = doctest.DocTestFinder(recurse=False).find(
        public[name], name, globs={'timm': timm, 'torch': torch, **public})
    assert example.examples, f'the docstring of timm_cbam.{name} has no example'
    report = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.append)
    assert not result.failed, ''.join(report)
