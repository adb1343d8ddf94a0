"""Pictures from batches: what a conditioner is given of them, in parts as in one."""

import torch

from sdtrain.diffusion.guidance import ClassifierFree
from sdtrain.stage.generation import Generation, for_conditioner


class FirstStage:
    latent_channels, down_factor = 4, 2

    def encode(self, image):
        half = torch.nn.functional.avg_pool2d(image, 2).requires_grad_()
        return type("Posterior", (), {"mean": half, "std": half})

    def decode(self, latent):
        return latent.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :3]

    def whiten(self, latent):
        return latent * 2

    unwhiten = staticmethod(torch.tanh)


class Sampler:
    guidance = ClassifierFree(2.0)

    def __call__(self, denoise, noise, path, draw):
        return noise + denoise(noise, 0.5)


class Objective:
    path = None

    def x0_of(self, model, variance=False):
        return lambda x, t, cond: cond["concat"]


class Conditioner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, batch, draw=None):
        self.asked.append(batch)
        value = torch.tensor([float(len(text)) for text in batch["caption"]])[:, None, None, None]
        return {
            "concat": value / 10 + batch["encode"](batch["image"]).mean((1, 2, 3), keepdim=True).expand(-1, 4, 3, 5)
        }

    def unconditional(self, batch):
        return self({**batch, "caption": [""] * len(batch["caption"])})


BATCH = {
    "caption": ["a", "bb", "ccc"],
    "attributes": [{"n": 1}, {"n": 2}, None],
    "image": torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 6, 10),
    "cursor": {"step": 3},
    "last_micro_of_step": True,
}


def generation():
    return Generation(torch.nn.Linear(1, 1), Conditioner(), Objective(), FirstStage(), Sampler(), latent_size=(3, 5))


def test_a_conditioner_is_given_all_that_is_known_of_the_samples():
    made = generation()
    pictures = made(BATCH, seed=0, size=2)
    assert pictures.shape == (3, 6, 10, 3)
    asked = made.conditioner.asked
    assert [batch["caption"] for batch in asked] == [["a", "bb"], ["", ""], ["ccc"], [""]]
    assert [batch["attributes"] for batch in asked[::2]] == [BATCH["attributes"][:2], [None]]
    assert torch.equal(torch.cat([batch["image"] for batch in asked[::2]]), BATCH["image"])
    assert [batch["sample_id"].tolist() for batch in asked[::2]] == [[0, 1], [2]]
    assert all((batch["image_size"], batch["latent_size"]) == ((6, 10), (3, 5)) for batch in asked)
    assert all("cursor" not in batch for batch in asked)


def test_a_picture_does_not_depend_on_how_many_are_drawn_together():
    assert (generation()(BATCH, 0, size=1) == generation()(BATCH, 0)).all()


def test_a_negative_reaches_the_null_condition():
    made = generation()
    made(BATCH | {"negative": ["x", "y", "z"]}, 0, size=2)
    assert [batch["negative"] for batch in made.conditioner.asked[1::2]] == [["x", "y"], ["z"]]


def test_its_own_number_stays_a_samples_own():
    made = generation()
    made(BATCH | {"sample_id": torch.tensor([7, 8, 9])}, 0)
    assert made.conditioner.asked[0]["sample_id"].tolist() == [7, 8, 9]


def test_encoded_pictures_are_whitened_and_have_no_gradient():
    encode = for_conditioner({}, FirstStage(), (3, 5))["encode"]
    latent = encode(BATCH["image"])
    torch.testing.assert_close(latent, 2 * BATCH["image"][:, :, :3, :5])
    assert not latent.requires_grad
