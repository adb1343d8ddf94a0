"""Regional compilation: the same numbers, every block compiled once a shape, names unchanged."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from sdtrain.errors import ConfigError
from sdtrain.layer.resnet import ResnetBlock
from sdtrain.ops.compile import compile_regions


class Net(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.blocks = nn.Sequential(*(ResnetBlock(w, w, groups=4) for w in widths))


@pytest.fixture(autouse=True)
def _forget():
    yield
    torch._dynamo.reset()


def test_blocks_of_one_shape_share_their_code_and_no_shape_is_left_out(monkeypatch):
    """Eleven shapes: more than torch's limit, past which it falls back without a word."""
    counter = CompileCounter()
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: compiled(self, backend=counter, **kw))
    widths = [4 * (1 + i // 2) for i in range(22)]
    net = Net(widths)
    names = list(net.state_dict())
    assert compile_regions(net) == 22
    assert list(net.state_dict()) == names
    for block, width in zip(net.blocks, widths):
        block(torch.randn(1, width, 4, 4, requires_grad=True))
    assert counter.frame_count == 11


@pytest.mark.slow
def test_compiled_and_plain_give_the_same_gradients():
    torch.manual_seed(0)
    net, x = Net([8, 8]), torch.randn(2, 8, 8, 8)
    net.blocks(x).square().mean().backward()
    plain = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    compile_regions(net)
    net.blocks(x).square().mean().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_shortcut_beside_few_positions_compiles_in_bfloat16():
    """The guard: as a product over patches, the convolution's bias and the shortcut's have one sum for a gradient,
    which Inductor declares twice.
    """
    torch.manual_seed(0)
    net, x = ResnetBlock(32, 64, groups=4), torch.randn(1, 32, 4, 4)
    grads = []
    for _ in ("plain", "compiled"):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        y.float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        net.zero_grad()
        compile_regions(net)
    plain, compiled = grads
    assert (plain - compiled).norm() < 0.02 * plain.norm()


def test_a_network_without_such_a_block_is_refused():
    with pytest.raises(ConfigError, match="Linear has no block to compile"):
        compile_regions(nn.Linear(2, 2))
