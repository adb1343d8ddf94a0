"""The VQ autoencoder: nearest codes, straight-through gradients, and codes that nobody uses. Its numbers beside
diffusers' stand in tests/contract/test_autoencoder_diffusers.py.
"""

import torch
from torch import nn

from sdtrain.first_stage import vq
from sdtrain.first_stage.vq import VectorQuantizer, VQModel
from sdtrain.layer.conv import Conv1x1

SMALL = {"block_out_channels": [8, 16], "norm_num_groups": 4, "num_vq_embeddings": 16}


def quantizer(num_codes=16, channels=3):
    torch.manual_seed(0)
    made = VectorQuantizer(num_codes, channels)
    nn.init.normal_(made.embedding.weight)
    return made


def test_each_position_takes_the_nearest_code(monkeypatch):
    made, z = quantizer(), torch.randn(2, 3, 5, 4)
    rows = z.double().permute(0, 2, 3, 1).flatten(0, 2)
    expected = torch.cdist(rows, made.embedding.weight.double()).argmin(dim=1).view(2, 5, 4)
    assert torch.equal(made(z).index, expected)
    assert torch.equal(made(z).latent[1, :, 2, 3], made.embedding.weight[expected[1, 2, 3]])  # to the last bit
    monkeypatch.setattr(vq, "_SCORES_AT_ONCE", 7 * 16)  # in portions, the last one smaller
    assert torch.equal(made.nearest(z), expected)
    many, z = quantizer(num_codes=256), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = many.nearest(z)
    assert torch.equal(found, many.nearest(z))


def test_codes_quantise_to_themselves():
    made = quantizer()
    codes = made(torch.randn(2, 3, 5, 4)).latent
    with torch.no_grad():
        again = made(codes)
    assert torch.equal(again.latent, codes)
    assert float(again.codebook) == float(again.commitment) == 0


def test_gradients_go_where_the_paper_sends_them():
    made, z = quantizer(), torch.randn(2, 3, 5, 4, requires_grad=True)
    direction, table = torch.randn(2, 3, 5, 4), made.embedding.weight

    def gradients(loss):
        return [torch.zeros_like(x) if g is None else g for x, g in zip((z, table), torch.autograd.grad(
            loss, (z, table), allow_unused=True))]  # fmt: skip

    of_latent, of_code = gradients((made(z).latent * direction).sum())
    assert torch.equal(of_latent, direction)  # straight through
    assert not of_code.any()
    of_latent, of_code = gradients(made(z).codebook)
    assert not of_latent.any()
    found, residual = made(z), (made(z).latent - z).detach()
    expected = torch.zeros_like(table).index_add_(
        0, found.index.flatten(), (2 * residual / z.numel()).permute(0, 2, 3, 1).flatten(0, 2)
    )
    torch.testing.assert_close(of_code, expected)
    of_latent, of_code = gradients(made(z).commitment)
    torch.testing.assert_close(of_latent, -2 * residual / z.numel())
    assert not of_code.any()


def test_perplexity_is_how_many_codes_are_in_use():
    made = quantizer(num_codes=8)
    z = made.embedding.weight.detach()[[0, 3, 3, 5, 5, 5, 5, 0]].T.reshape(1, 3, 2, 4)  # shares 1/4, 1/4, 1/2
    torch.testing.assert_close(made(z).perplexity, torch.tensor(2.0**1.5))
    torch.testing.assert_close(made(z[..., :1, :1]).perplexity, torch.tensor(1.0))


def test_a_code_is_dead_when_training_chose_it_for_long_in_no_batch():
    made = quantizer(num_codes=8)
    z = made.embedding.weight.detach()[[1, 6]].T.reshape(1, 3, 1, 2)
    dead = [int(made(z).num_dead) for _ in range(100)]
    assert dead == [0] * 99 + [6]
    with torch.no_grad():  # an evaluation revives nothing
        other = made(made.embedding.weight[[2]].T.reshape(1, 3, 1, 1))
    assert int(other.num_dead) == 6
    assert int(made(made.embedding.weight.detach()[[2]].T.reshape(1, 3, 1, 1)).num_dead) == 5
    assert list(made.state_dict()) == ["embedding.weight"]  # no part of the weights, nor of their hash


def test_the_posterior_is_the_latent_before_quantisation():
    torch.manual_seed(0)
    network = VQModel(**SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = network.encode(torch.randn(2, 3, 8, 8))
    assert posterior.mean.dtype == posterior.std.dtype == torch.float32
    assert posterior.mean.shape == (2, 3, 4, 4)
    assert not posterior.std.any()
    assert not torch.equal(network.quantize(posterior.mean).latent, posterior.mean)
    assert (network.latent_channels, network.down_factor) == (3, 2)
    assert VQModel(**SMALL, vq_embed_dim=5).latent_channels == 5  # what a denoiser sees


def test_the_codebook_starts_as_wide_as_the_latents():
    for channels, widths in ((3, [8, 16]), (8, [32, 32, 64])):
        torch.manual_seed(0)
        network = VQModel(block_out_channels=widths, latent_channels=channels, norm_num_groups=4)
        with torch.no_grad():
            latent = network.encode(torch.rand(2, 3, 32, 32) * 2 - 1).mean
            share = network.quantize.embedding.weight.std() / latent.std()
        assert 0.5 < float(share) < 2


def test_every_convolution_meets_channels_last():
    network, met = VQModel(**SMALL), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, Conv1x1):  # whose channels stand last anyway
            module.register_forward_hook(lambda m, xs, y, name=name: met.update({name: (xs[0], y)}))
    network.decode(network.encode(torch.randn(2, 3, 16, 16)).mean)
    assert len(met) > 20
    for name, tensors in met.items():
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors), name
