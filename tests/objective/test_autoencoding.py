"""Stage 1's one backward against two written by hand: whose gradient comes from where, and the adversary's weight."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from sdtrain.errors import ConfigError
from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
from sdtrain.first_stage.vq import VQModel
from sdtrain.layer.perceptual import Perceptual
from sdtrain.layer.vgg import VGG
from sdtrain.model.discriminator import PatchDiscriminator
from sdtrain.objective.autoencoding import Autoencoding, VQAutoencoding
from sdtrain.ops.random import Draw

START, KL, PERCEPTUAL, ADVERSARIAL, LOGVAR = 10, 0.01, 0.3, 0.5, 0.2
IMAGE = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
DRAW = Draw.of(0, 4)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in VGG(((4,), (6,))).state_dict().items()}, path)
    return str(path)


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False)


@pytest.fixture
def objective(vgg_file):
    return make(vgg_file)


def make(vgg_file, **changes):
    torch.manual_seed(3)
    arguments = {
        "kl_weight": KL,
        "perceptual": Perceptual(((4,), (6,)), vgg_file),
        "perceptual_weight": PERCEPTUAL,
        "discriminator": PatchDiscriminator(width=8, num_layers=1),
        "adversarial_weight": ADVERSARIAL,
        "adversarial_start": START,
        "logvar": LOGVAR,
    }
    made = Autoencoding(**arguments | changes)
    if made.discriminator is not None:
        for p in made.discriminator.parameters():  # far from its shy start, so that its gradients weigh something
            p.data.mul_(5)
    return made


def by_hand(autoencoder, objective, adaptive_weight, image=IMAGE, draw=DRAW):
    """The gradients that two optimizers and three backwards would give, and the adaptive weight of this batch."""
    posterior = autoencoder.encode(image)
    latent = posterior.mean + posterior.std * draw.normal("posterior", posterior.mean.shape[1:])
    fake = autoencoder.decode(latent)
    pixel = (fake - image).abs().mean()
    perceptual = objective.perceptual.module(fake, image).mean()
    reconstruction = (pixel + PERCEPTUAL * perceptual) / objective.logvar.exp()
    kl = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum() / image.numel()
    generator = -objective.discriminator(fake).mean()
    total = reconstruction + objective.logvar + KL * kl + ADVERSARIAL * adaptive_weight * generator
    learned = [*autoencoder.parameters(), *objective.generator_parameters()]
    of_generator = torch.autograd.grad(total, learned, retain_graph=True)
    last = autoencoder.decoder.conv_out.weight
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (reconstruction, generator)]
    real, made = objective.discriminator(image), objective.discriminator(fake.detach())
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())
    of_discriminator = torch.autograd.grad(hinge, objective.discriminator_parameters())
    return of_generator, of_discriminator, float(norms[0] / norms[1])


def gradients(autoencoder, objective):
    generator = [*autoencoder.parameters(), *objective.generator_parameters()]
    return [p.grad for p in generator], [p.grad for p in objective.discriminator_parameters()]


def assert_same(found, expected, share=1e-4):
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= share * float(b.norm()) + 1e-6


@pytest.mark.parametrize("adaptive_weight", [0.0, 0.7, 30.0])
def test_one_backward_gives_each_side_its_own_gradients(autoencoder, objective, adaptive_weight):
    of_generator, of_discriminator, _ = by_hand(autoencoder, objective, adaptive_weight)
    objective.adaptive_weight.fill_(adaptive_weight)
    objective.loss(autoencoder, IMAGE, DRAW, START)["loss"].backward()
    found_generator, found_discriminator = gradients(autoencoder, objective)
    assert_same(found_generator, of_generator)
    assert_same(found_discriminator, of_discriminator)
    assert float(torch.stack([g.norm() for g in found_discriminator]).sum()) > 0.01


def test_the_discriminators_step_tells_real_from_made_and_the_generators_step_does_the_opposite(autoencoder, objective):
    objective.adaptive_weight.fill_(100.0)
    objective.loss(autoencoder, IMAGE, DRAW, START)["loss"].backward()

    def opinions(first_stage, discriminator):
        with torch.no_grad():
            latent = first_stage.encode(IMAGE)
            made = first_stage.decode(latent.mean + latent.std * DRAW.normal("posterior", latent.mean.shape[1:]))
            return float(discriminator(IMAGE).mean()), float(discriminator(made).mean())

    def stepped(module, size):
        moved = copy.deepcopy(module)
        with torch.no_grad():
            for p, old in zip(moved.parameters(), module.parameters()):
                p.sub_(size * old.grad)
        return moved

    real, made = opinions(autoencoder, objective.discriminator)
    wiser_real, wiser_made = opinions(autoencoder, stepped(objective.discriminator, 1e-3))
    assert wiser_real - wiser_made > real - made
    assert opinions(stepped(autoencoder, 1e-5), objective.discriminator)[1] > made


def test_before_the_start_the_discriminators_gradients_are_zero_and_there(autoencoder, objective, vgg_file):
    objective.adaptive_weight.fill_(5.0)
    terms = objective.loss(autoencoder, IMAGE, DRAW, START - 1)
    terms["loss"].backward()
    generator, discriminator = gradients(autoencoder, objective)
    assert len(discriminator) > 5
    assert all(gradient is not None and not gradient.any() for gradient in discriminator)
    alone = copy.deepcopy(autoencoder).requires_grad_(True)
    alone.zero_grad()
    without = make(vgg_file, discriminator=None)
    expected = without.loss(alone, IMAGE, DRAW, START - 1)
    expected["loss"].backward()
    assert_same(generator, gradients(alone, without)[0])
    torch.testing.assert_close(terms["loss"], expected["loss"])
    assert without.discriminator_parameters() == []


def test_the_adaptive_weight_is_the_ratio_at_the_last_layer_and_serves_the_next_step(autoencoder, objective):
    expected = by_hand(autoencoder, objective, 0.0)[2]
    terms = objective.loss(autoencoder, IMAGE, DRAW, START)
    terms["loss"].backward()
    assert float(terms["adaptive_weight"]) == float(objective.adaptive_weight) == 0
    objective.update_adaptive_weight(lambda x: x)
    assert float(objective.adaptive_weight) == pytest.approx(expected, rel=1e-3)
    assert 1e-3 < expected < 1e3
    generator, _, again = by_hand(autoencoder, objective, expected)
    autoencoder.zero_grad()
    objective.zero_grad()
    terms = objective.loss(autoencoder, IMAGE, DRAW, START + 1)
    assert float(terms["adaptive_weight"]) == pytest.approx(expected, rel=1e-3)
    terms["loss"].backward()
    assert_same(gradients(autoencoder, objective)[0], generator, share=2e-3)
    objective.update_adaptive_weight(lambda x: x)
    assert float(objective.adaptive_weight) == pytest.approx(again, rel=1e-3)  # of the loss itself, not of w times it


def half(objective, autoencoder, part):
    ids = torch.arange(4)[part]
    terms = objective.loss(autoencoder, IMAGE[part], Draw(0, ids, ids * 0), START)
    (terms["loss"] / 2).backward()


def test_two_micro_batches_give_the_weight_of_the_whole(autoencoder, objective):
    whole = by_hand(autoencoder, objective, 0.0)
    half(objective, autoencoder, slice(0, 2))
    with torch.no_grad():  # an evaluation in between is no part of it
        objective.loss(autoencoder, -IMAGE, DRAW, START)
    half(objective, autoencoder, slice(2, 4))
    objective.update_adaptive_weight(lambda x: x)
    assert float(objective.adaptive_weight) == pytest.approx(whole[2], rel=1e-3)
    assert_same(gradients(autoencoder, objective)[1], whole[1])


def test_two_ranks_give_the_weight_of_the_whole(autoencoder, objective):
    whole = by_hand(autoencoder, objective, 0.0)[2]
    others = copy.deepcopy(objective)
    half(objective, autoencoder, slice(0, 2))
    half(others, autoencoder, slice(2, 4))
    sums = []
    others.update_adaptive_weight(lambda x: sums.append(x) or x)
    objective.update_adaptive_weight(lambda x: x + sums.pop(0))
    assert float(objective.adaptive_weight) == pytest.approx(whole, rel=1e-3)
    assert float(others.adaptive_weight) != pytest.approx(whole, rel=1e-2)


def test_without_adversarial_steps_the_weight_stays(autoencoder, objective):
    objective.adaptive_weight.fill_(3.0)
    objective.loss(autoencoder, IMAGE, DRAW, START - 1)["loss"].backward()
    objective.update_adaptive_weight(lambda x: x)
    assert float(objective.adaptive_weight) == 3.0
    with torch.no_grad():
        objective.loss(autoencoder, IMAGE, DRAW, START)
    objective.update_adaptive_weight(lambda x: x)
    assert float(objective.adaptive_weight) == 3.0


@pytest.mark.parametrize("factors", [(1, torch.inf), (torch.inf, 1), (torch.nan, 1), (1, torch.nan)])
def test_a_step_that_is_not_finite_leaves_the_weight_as_it_is(autoencoder, objective, factors):
    objective.adaptive_weight.fill_(3.0)
    objective.loss(autoencoder, IMAGE, DRAW, START)["loss"].backward()
    each = iter(factors)
    objective.update_adaptive_weight(lambda x: x * next(each))
    assert float(objective.adaptive_weight) == 3.0


def test_steps_do_not_add_up(autoencoder, objective):
    objective.loss(autoencoder, IMAGE * 0.1, DRAW, START)["loss"].backward()
    objective.update_adaptive_weight(lambda x: x)
    objective.adaptive_weight.zero_()
    expected = by_hand(autoencoder, objective, 0.0)[2]
    objective.loss(autoencoder, IMAGE, DRAW, START)["loss"].backward()
    objective.update_adaptive_weight(lambda x: x)
    assert float(objective.adaptive_weight) == pytest.approx(expected, rel=1e-3)


def test_in_bfloat16_the_weight_is_kept_in_float32(autoencoder, objective):
    expected = by_hand(autoencoder, objective, 0.0)[2]
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(autoencoder, IMAGE, DRAW, START)["loss"]
    loss.backward()
    objective.update_adaptive_weight(lambda x: x)
    assert loss.dtype == objective.adaptive_weight.dtype == torch.float32
    assert float(objective.adaptive_weight) == pytest.approx(expected, rel=0.1)


def test_who_moves_with_whom_and_what_is_saved(autoencoder, objective):
    objective.loss(autoencoder, IMAGE, DRAW, START)["loss"].backward()
    assert objective.generator_parameters() == [objective.logvar]
    assert float(objective.logvar.grad) != 0
    assert {id(p) for p in objective.parameters()} == {
        id(p) for p in (objective.logvar, *objective.discriminator_parameters())
    }
    assert {name.split(".")[0] for name in objective.state_dict()} == {"logvar", "adaptive_weight", "discriminator"}
    assert all(p.grad is None for p in objective.perceptual.module.parameters())


@pytest.mark.parametrize("pixel", ["l1", "mse"])
def test_the_terms_are_the_definitions(autoencoder, vgg_file, pixel):
    objective = make(vgg_file, pixel=pixel, discriminator=None, perceptual=None)
    terms = objective.loss(autoencoder, IMAGE, DRAW, 0)
    posterior = autoencoder.encode(IMAGE)
    fake = autoencoder.decode(posterior.mean + posterior.std * DRAW.normal("posterior", posterior.mean.shape[1:]))
    distance = (fake - IMAGE).abs().mean() if pixel == "l1" else (fake - IMAGE).square().mean()
    kl = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum() / IMAGE.numel()
    torch.testing.assert_close(terms["pixel"], distance.detach())
    torch.testing.assert_close(terms["kl"], kl.detach())
    expected = distance / objective.logvar.exp() + objective.logvar + KL * kl
    torch.testing.assert_close(terms["loss"], expected)
    assert terms["loss"].requires_grad
    assert not any(value.requires_grad for name, value in terms.items() if name != "loss")


def test_an_unknown_pixel_loss_is_refused():
    with pytest.raises(ConfigError, match="pixel is l1 or mse, not 'l2'"):
        Autoencoding(pixel="l2")


def test_the_discriminators_first_step_is_one_learning_rate_long(autoencoder, objective):
    learned, lr = objective.discriminator_parameters(), 1e-3
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.1)
    start = [p.detach().clone() for p in learned]

    def step(number):
        optimizer.zero_grad()
        objective.loss(autoencoder, IMAGE, DRAW, number)["loss"].backward()
        took_part = objective.update_adaptive_weight(lambda x: x)
        assert took_part == (number >= START)
        for p in learned if not took_part else ():  # as the stage does, or its strategy
            p.grad = None
        optimizer.step()
        return [p.detach().clone() for p in learned]

    before = [step(number) for number in range(START - 3, START)][-1]
    assert all(torch.equal(a, b) for a, b in zip(before, start, strict=True))  # nor does it decay
    assert not optimizer.state
    moved = torch.cat([(a * (1 - lr * 0.1) - b).flatten().abs() for a, b in zip(before, step(START), strict=True)])
    assert float(moved.median()) == pytest.approx(lr, rel=0.01)
    assert float(moved.max()) < 1.01 * lr


@pytest.fixture
def vq():
    torch.manual_seed(0)
    return VQModel(block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=16, mid_block_add_attention=False)


def test_a_codebooks_loss_stands_in_place_of_the_kl(vq):
    objective = VQAutoencoding(codebook_weight=0.3, commitment_weight=2.0)
    terms = objective.loss(vq, IMAGE, DRAW, 0)
    assert terms.keys() == {"loss", "pixel", "perceptual", "codebook", "commitment", "perplexity", "num_dead"}
    z = vq.encode(IMAGE).mean
    codes = vq.quantize.embedding(vq.quantize.nearest(z)).permute(0, 3, 1, 2)
    pixel, gap = (vq.decode(z) - IMAGE).abs().mean(), (codes - z).square().mean()
    torch.testing.assert_close(terms["loss"], pixel + 2.3 * gap)
    torch.testing.assert_close(terms["codebook"], gap.detach())
    assert objective.generator_parameters() == []
    assert 1 <= float(terms["perplexity"]) <= 16


def test_encoder_and_codebook_each_learn_from_their_own(vq):
    def gradients(**weights):
        vq.zero_grad()
        VQAutoencoding(**weights).loss(vq, IMAGE, DRAW, 0)["loss"].backward()
        encoder = torch.cat([p.grad.flatten() for p in (*vq.encoder.parameters(), *vq.quant_conv.parameters())])
        return encoder.clone(), vq.quantize.embedding.weight.grad.clone()

    straight, none = gradients(codebook_weight=0.0, commitment_weight=0.0)
    assert float(straight.norm()) > 1e-3  # the reconstruction's, straight through
    assert not none.any()
    same, moved = gradients(codebook_weight=1.0, commitment_weight=0.0)
    torch.testing.assert_close(same, straight)
    assert moved.any()
    other, none = gradients(codebook_weight=0.0, commitment_weight=1.0)
    assert float((other - straight).norm()) > 1e-3
    assert not none.any()


def test_an_autoencoder_with_a_codebook_learns(vq):
    objective = VQAutoencoding(discriminator=PatchDiscriminator(width=8, num_layers=1), adversarial_start=10)
    learned = [*vq.parameters(), *objective.discriminator_parameters()]
    optimizer, terms = torch.optim.AdamW(learned, lr=3e-3), []
    coarse = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    images = F.interpolate(coarse, size=(16, 16))  # squares of random colours
    for step in range(20):
        optimizer.zero_grad()
        found = objective.loss(vq, images[step % 4 * 16 :][:16], Draw.of(step, 16), step)
        found["loss"].backward()
        objective.update_adaptive_weight(lambda x: x)
        optimizer.step()
        terms.append({name: float(value.detach()) for name, value in found.items()})
    assert sum(t["pixel"] for t in terms[-3:]) < 0.9 * sum(t["pixel"] for t in terms[:3])
    assert terms[-1]["perplexity"] > 2
    assert terms[-1]["adaptive_weight"] > 0


def test_objective_and_first_stage_must_be_of_a_kind(autoencoder, vq):
    with pytest.raises(ConfigError, match="has a codebook.*=autoencoding_vq"):
        Autoencoding().loss(vq, IMAGE, DRAW, 0)
    with pytest.raises(ConfigError, match="has no codebook.*=autoencoding"):
        VQAutoencoding().loss(autoencoder, IMAGE, DRAW, 0)
