"""The PyTorch loop of README.md gives the results of the plain loop."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import BACKEND

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]


def code_of_readme(containing):
    text = (ROOT / "README.md").read_text()
    (code,) = [
        code
        for code in re.findall(
            r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
        )
        if containing in code
    ]
    return code


@pytest.mark.skipif(BACKEND != "torch", reason="a loop of PyTorch's")
def test_the_pytorch_loop_of_the_readme():
    import torch

    code = code_of_readme("optimizer.step()")
    plain, count = re.subn(
        r"    loss, gradients = .*?\n    optimizer.step",
        "    loss_fn(batch).backward()\n    optimizer.step",
        code,
        flags=re.DOTALL,
    )
    assert count == 1

    def trained(code):
        torch.manual_seed(0)
        names = {}
        exec(code, names)
        assert all(p.grad is None for p in names["module"].parameters())
        return [p.detach().numpy() for p in names["module"].parameters()]

    begun = plain.replace("optimizer.step()", "pass")
    for ours, reference, before in zip(*map(trained, (code, plain, begun))):
        moved = np.abs(reference - before).max()
        assert moved > 1e-3
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * moved)
