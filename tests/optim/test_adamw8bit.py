"""AdamW with moments in 8 bits: whose library it takes, and what is said where there is none."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.optim.adamw8bit import AdamW8bit


@pytest.fixture
def libraries(monkeypatch):
    """libraries(names) -> stands in for those that are installed; their optimizer is torch's, and says its library."""
    for name in ("bitsandbytes", "bitsandbytes.optim", "torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, None)

    def install(*names):
        for name in names:
            module = ModuleType(f"{name}.optim")
            module.AdamW8bit = type("Made", (torch.optim.AdamW,), {"library": name})
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(optim=module))
            monkeypatch.setitem(sys.modules, f"{name}.optim", module)

    return install


def test_without_a_library_one_line_names_the_package(libraries):
    with pytest.raises(
        ConfigError, match="optim=adamw8bit needs bitsandbytes, or torchao: pip install bitsandbytes"
    ) as e:
        AdamW8bit().build({"model": [nn.Parameter(torch.zeros(2, 2))]}, 10)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("installed", "taken"),
    [(["bitsandbytes"], "bitsandbytes"), (["torchao"], "torchao"), (["torchao", "bitsandbytes"], "bitsandbytes")],
)
def test_the_groups_and_values_are_adamws(libraries, installed, taken):
    libraries(*installed)
    parts = {"model": list(nn.Linear(3, 2).parameters())}
    recipe = AdamW8bit(lr=0.1, betas=(0.8, 0.9), weight_decay=0.5, warmup_steps=2)
    made, schedule = recipe.build(parts, 10)
    assert made.library == taken
    assert made.defaults["betas"] == (0.8, 0.9)
    assert [(group["name"], group["weight_decay"], group["initial_lr"]) for group in made.param_groups] == [
        ("model", 0.5, 0.1),
        ("model", 0.0, 0.1),
    ]
    assert schedule.get_last_lr() == [0.05, 0.05]


def test_it_is_an_option_of_every_recipe():
    optim = load_config(["+experiment=smoke", "optim@diffusion.optim=adamw8bit", "diffusion.optim.betas=[0.9,0.95]"])
    optim = optim.diffusion.optim
    assert (optim._target_, optim.betas, optim.decay) == ("sdtrain.optim.adamw8bit.AdamW8bit", [0.9, 0.95], "linear")
